"""Records to texts: every format of demonstrations and preferences, known by its keys, in one canonical form.

A text is plain (a string, taken as it is) or a dialogue: a list of {"role": ..., "content": ...} messages, which a
template writes down (`rm.data.chat`). `docs/data.md` shows each format. The functions raise ValueError without naming
the record, which only the caller knows.
"""

import math
import re
import reprlib
from dataclasses import dataclass

Message = dict[str, str]  # {"role": "user", "content": "hi"}
Text = str | list[Message]

DEMONSTRATIONS = {"text_only": ("text",), "text2text": ("input", "output"), "conversation": ("messages",)}
PREFERENCES = {
    "positive/negative": ("positive", "negative"),
    "chosen/rejected": ("chosen", "rejected"),
    "prompt/chosen/rejected": ("prompt", "chosen", "rejected"),
    "prompt/responses": ("prompt", "responses"),
    "prompt/responses/ranks": ("prompt", "responses", "ranks"),
    "prompt/responses/scores": ("prompt", "responses", "scores"),
}
TURNS = (re.compile(r"(?:\A|\n\n)(Human|Assistant):"), re.compile(r"###(Human|Assistant):"))  # Anthropic, LMFlow


@dataclass(frozen=True)
class Sample:
    """A record in canonical form: one text to imitate, or K >= 2 texts to compare.

    `grade` is None where the record does not say which texts are better.
    """

    format: str
    texts: list[Text]  # K full texts, prompt included; the chosen one first, rankings in the record's order
    grade: list[float] | None = None  # K numbers: higher is better, equal is a tie
    label: float = 1.0  # probability that the grades of a pair are right
    margin: float = 0.0  # by how much the better reward should exceed the other
    loss_from: int = 0  # characters at the head of a plain text to imitate that carry no loss


def demonstration(record: dict, as_messages: bool = False) -> Sample:
    """The one text of a record for SFT. With `as_messages`, text2text is a dialogue of one question and its answer."""
    name = _format(record, DEMONSTRATIONS, PREFERENCES, "train_rm.py")
    if name == "text_only":
        return Sample(name, [_string(record["text"], "text")])
    if name == "conversation":
        return Sample(name, [_dialogue(record, "messages")])
    question, answer = (_string(record[key], key) for key in ("input", "output"))
    if as_messages:
        return Sample(name, [[_message("user", question), _message("assistant", answer)]])
    return Sample(name, [question + answer], loss_from=len(question))


def preference(record: dict, as_messages: bool = False) -> Sample:
    """The texts of a preference record, and which are better.

    With `as_messages` every text is a dialogue: full texts are split into turns, and a prompt that is a bare string
    is a user's message. Without, strings stay as they are; a prompt goes in front of each answer.
    """
    name = _format(record, PREFERENCES, DEMONSTRATIONS, "train_sft.py")
    keys = PREFERENCES[name]
    if all(_is_strings(record.get(key)) for key in ("chosen", "rejected")) and "prompt" in keys:  # RewardBench 2
        good, bad = record["chosen"], record["rejected"]
        record = {"prompt": record["prompt"], "responses": good + bad, "scores": [1] * len(good) + [0] * len(bad)}
        return preference(record, as_messages)
    answers = [(key, record[key]) for key in keys[-2:]]
    if "responses" in keys:
        answers = _responses(record["responses"])
    if "prompt" in keys:
        prompt = _text(record["prompt"], "prompt")
        texts = [_after(prompt, _text(value, key), key, as_messages) for key, value in answers]
    else:
        texts = [_text(value, key) for key, value in answers]
        texts = [split_turns(text) if as_messages and isinstance(text, str) else text for text in texts]
    return Sample(name, texts, _grade(record, keys, len(texts)), *_certainty(record, keys))


def conversations(record: dict, as_messages: bool = False) -> list[Text]:
    """The full texts or dialogues that a preference record compares, in the order in which they are scored."""
    return preference(record, as_messages).texts


def split_turns(text: str) -> list[Message]:
    """A dialogue from "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic) or "###Human: ...###Assistant: ..." (LMFlow).

    The one space after a colon belongs to the colon.
    """
    style = _style(text)
    if style is None:
        expected = '"\\n\\nHuman: ...\\n\\nAssistant: ..." or "###Human: ...###Assistant: ..."'
        raise ValueError(f"{reprlib.repr(text)} is no dialogue; to be put in a template it must read {expected}")
    found = list(style.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    turns = ((match[1], text[match.end() : end]) for match, end in zip(found, ends, strict=True))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [_message(roles[who], content.removeprefix(" ")) for who, content in turns]


def _style(text: str) -> re.Pattern | None:
    """How a full text marks its turns: by what it opens with."""
    return next((style for style in TURNS if style.match(text)), None)


def _format(record: dict, formats: dict[str, tuple], others: dict[str, tuple], script: str) -> str:
    """The one format whose keys the record has; of two where one has more keys than the other, that one."""
    fits = [name for name, keys in formats.items() if record.keys() >= set(keys)]
    fits = [name for name in fits if not any(set(formats[name]) < set(formats[other]) for other in fits)]
    shown = ", ".join(reprlib.repr(key) for key in list(record)[:12]) or "none"
    has = f"has the keys {shown}" + (f" and {len(record) - 12} more" if len(record) > 12 else "")
    if len(fits) > 1:
        raise ValueError(f"{has}, which fit {' and '.join(fits)}; leave it the keys of one")
    if not fits:
        known = ", or ".join(" + ".join(map(repr, keys)) for keys in formats.values())
        elsewhere = any(record.keys() >= set(keys) for keys in others.values())
        raise ValueError(f"{has}; expected {known}" + (f" (this record is for {script})" if elsewhere else ""))
    if formats is PREFERENCES and "prompt" in record and "prompt" not in formats[fits[0]]:
        raise ValueError(f"{has}: a prompt apart goes with 'chosen' and 'rejected'; rename them, or put it in both")
    return fits[0]


def _string(value, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected its text, a string")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can write it, UTF-8 cannot
        raise ValueError(f"{key!r} has half of a surrogate pair, no character; remove it")
    return value


def _text(value, key: str) -> Text:
    """A string, a list of messages, one message, or LMFlow's object with `messages` and perhaps `system`."""
    if isinstance(value, dict) and "role" in value:  # a list of one
        value = [value]
    if isinstance(value, list):
        return _dialogue({key: value}, key)
    if isinstance(value, dict):
        return _dialogue(value, "messages")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected its text, a string, or a list of messages")
    return _string(value, key)


def _dialogue(holder: dict, key: str) -> list[Message]:
    """The messages under a key, opened by the `system` beside them; checked."""
    found = holder.get(key)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{key!r} is {reprlib.repr(found)}; expected a list of messages with 'role' and 'content'")
    if holder.get("tools"):
        raise ValueError("has 'tools', which are not supported; write them into the system message")
    messages = [_checked(message, f"{key} {n}") for n, message in enumerate(found, start=1)]
    if holder.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"has a 'system' beside {key!r} that open with a system message; keep one of them")
        messages.insert(0, _message("system", _string(holder["system"], "system")))
    return messages


def _checked(message, key: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"{key!r} is {reprlib.repr(message)}; expected an object with 'role' and 'content'")
    if message.get("tool_calls"):
        raise ValueError(f"{key!r} has 'tool_calls', which are not supported; write them into its content")
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_string(part.get("text"), key) for part in content)  # OpenAI's parts
    return _message(_string(message["role"], key), _string(content, key))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _is_strings(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _responses(found) -> list[tuple[str, object]]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"'responses' is {reprlib.repr(found)}; expected a list of answers")
    return [(f"responses {n}", answer) for n, answer in enumerate(found, start=1)]


def _after(prompt: Text, answer: Text, key: str, as_messages: bool) -> Text:
    """The full text of a prompt and an answer. An answer of messages may hold the prompt already."""
    if isinstance(prompt, str) and isinstance(answer, str):
        if not as_messages:
            return prompt + answer
        answer = answer.removeprefix(" ") if _style(prompt) else answer
    question = _question(prompt) if isinstance(prompt, str) else prompt
    if isinstance(answer, str):
        return [*question, _message("assistant", answer)]
    if answer[0]["role"] == "assistant":
        return [*question, *answer]
    opening = [message for message in answer if message["role"] != "system"] if isinstance(prompt, str) else answer
    if opening[: len(question)] != question:
        raise ValueError(f"{key!r} opens with another message than 'prompt'; remove 'prompt' where it is whole")
    return answer


def _question(prompt: str) -> list[Message]:
    """A prompt as messages; the "Assistant:" that ends it is where the answer goes."""
    turns = split_turns(prompt) if _style(prompt) else [_message("user", prompt)]
    return turns[:-1] if turns[-1] == _message("assistant", "") else turns


def _grade(record: dict, keys: tuple[str, ...], replies: int) -> list[float] | None:
    if "responses" not in keys:
        return [1.0, 0.0]
    if keys[-1] == "responses":
        return None
    values = record[keys[-1]]
    if not isinstance(values, list) or len(values) != replies:
        raise ValueError(f"{keys[-1]!r} is {reprlib.repr(values)}; expected one number for each of {replies} responses")
    numbers = [_number(value, keys[-1]) for value in values]
    return numbers if keys[-1] == "scores" else [-number for number in numbers]


def _certainty(record: dict, keys: tuple[str, ...]) -> tuple[float, float]:
    """(label, margin)"""
    given = {key: _number(record[key], key) for key in ("label", "margin") if record.get(key) is not None}
    if given and "responses" in keys:
        raise ValueError(f"has {' and '.join(map(repr, given))}: that is for pairs, not for rankings; remove it")
    if not 0 <= given.get("label", 1.0) <= 1:
        raise ValueError(f"'label' is {given['label']:g}; expected the probability, 0 to 1, that the first is better")
    return given.get("label", 1.0), given.get("margin", 0.0)


def _number(value, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3e38 or math.isnan(value):
        raise ValueError(f"{key!r} has {reprlib.repr(value)}; expected finite numbers")
    return float(value)
