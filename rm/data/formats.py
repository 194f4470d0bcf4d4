"""Converts records to texts: every format of demonstrations and preferences, recognised by its keys, to a `Sample`.

A text is plain (a string, taken as it is) or a dialogue: a list of {"role": ..., "content": ...} messages, which a
chat template writes as a string (`rm.data.chat`). `docs/data.md` shows each format. The functions raise ValueError
without naming the record, which only the caller knows.
"""

import math
import re
import reprlib
from dataclasses import dataclass

Message = dict[str, str]  # {"role": "user", "content": "hi"}
Text = str | list[Message]

# Format name -> its keys
DEMONSTRATIONS = {"text_only": ("text",), "text2text": ("input", "output"), "conversation": ("messages",)}
PREFERENCES = {
    "positive/negative": ("positive", "negative"),
    "chosen/rejected": ("chosen", "rejected"),
    "prompt/chosen/rejected": ("prompt", "chosen", "rejected"),
    "prompt/responses": ("prompt", "responses"),
    "prompt/responses/ranks": ("prompt", "responses", "ranks"),
    "prompt/responses/scores": ("prompt", "responses", "scores"),
}
TURN_MARKERS = (
    re.compile(r"(?:\A|\n\n)(Human|Assistant):"),  # Anthropic
    re.compile(r"###(Human|Assistant):"),  # LMFlow
)


@dataclass(frozen=True)
class Sample:
    """A record in canonical form: one text for SFT, or K responses to score or to compare.

    `grade` is None where the record does not say which texts are better.
    """

    format: str
    texts: list[Text]  # K full texts, prompt included; of a pair the chosen one first, rankings in the record's order
    grade: list[float] | None = None  # K numbers: higher is better, equal is a tie
    label: float = 1.0  # probability that the grades of a pair are right
    margin: float = 0.0  # by how much the better reward should exceed the other
    loss_from: int = 0  # of a plain text for SFT: number of leading characters that carry no loss
    bare: bool = False  # its prompt and replies are bare strings, which are joined or made a dialogue


def demonstration(record: dict, as_messages: bool = False) -> Sample:
    """Convert a record for SFT. With `as_messages`, text2text becomes a dialogue of one user and one assistant turn."""
    name = _format_of(record, DEMONSTRATIONS, PREFERENCES, "train_rm.py")
    if name == "text_only":
        return Sample(name, [_string(record["text"], "text")])
    if name == "conversation":
        return Sample(name, [_dialogue(record, "messages")])
    prompt, reply = (_string(record[key], key) for key in ("input", "output"))
    if as_messages:
        return Sample(name, [[_message("user", prompt), _message("assistant", reply)]], bare=True)
    return Sample(name, [prompt + reply], loss_from=len(prompt), bare=True)


def preference(record: dict, as_messages: bool = False, bare_as_dialogue: bool | None = None) -> Sample:
    """Convert a preference record: its full texts, and which of them are better.

    Args:
        as_messages: split full texts that are strings into turns. Otherwise they stay strings.
        bare_as_dialogue: make a prompt and a reply that are bare strings a dialogue of one user and one assistant turn,
            or of the turns that are marked in the prompt. Otherwise they are joined as they stand. None: as_messages.
    """
    if bare_as_dialogue is None:
        bare_as_dialogue = as_messages
    name = _format_of(record, PREFERENCES, DEMONSTRATIONS, "train_sft.py")
    keys = PREFERENCES[name]
    # RewardBench 2 has lists of chosen and rejected responses: a ranking with two grades.
    if "prompt" in keys and _is_list_of_strings(record.get("chosen")) and _is_list_of_strings(record.get("rejected")):
        chosen, rejected = record["chosen"], record["rejected"]
        scores = [1] * len(chosen) + [0] * len(rejected)
        ranking = {"prompt": record["prompt"], "responses": chosen + rejected, "scores": scores}
        return preference(ranking, as_messages, bare_as_dialogue)

    if "responses" in keys:
        responses = _responses(record["responses"])
    else:
        responses = [(key, record[key]) for key in keys[-2:]]  # the last two keys of a pair are its sides
    texts, bare = [], False
    if "prompt" in keys:
        prompt = _text(record["prompt"], "prompt")
        replies = [(key, _text(value, key)) for key, value in responses]
        texts = [_join(prompt, reply, key, bare_as_dialogue) for key, reply in replies]
        bare = isinstance(prompt, str) and any(isinstance(reply, str) for _, reply in replies)
    else:
        texts = [_text(value, key) for key, value in responses]
        if as_messages:
            texts = [split_turns(text) if isinstance(text, str) else text for text in texts]
    grades = _grades(record, keys, len(texts))
    label, margin = _label_and_margin(record, keys)
    return Sample(name, texts, grades, label, margin, bare=bare)


def preference_dialogues(record: dict) -> Sample:
    """`preference`, with a record's prompt kept apart from its responses: for code that compares records turn by turn.

    Where the record has a prompt, its texts are dialogues, so a prompt that is a bare string is a user message. Joined
    with the response into one string, nothing would mark where the prompt ends. Full texts without a prompt stay
    strings, which `rm.data.conversation.turns` can split at their own markers.
    """
    return preference(record, bare_as_dialogue=True)


def split_turns(text: str) -> list[Message]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic) or "###Human: ...###Assistant: ..." (LMFlow) into turns.

    One space after a colon is part of the marker.
    """
    marker = _turn_marker(text)
    if marker is None:
        expected = '"\\n\\nHuman: ...\\n\\nAssistant: ..." or "###Human: ...###Assistant: ..."'
        raise ValueError(f"{reprlib.repr(text)} is no dialogue; for a chat template a text must have turns: {expected}")
    matches = list(marker.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for match, end in zip(matches, ends, strict=True):
        content = text[match.end() : end].removeprefix(" ")
        turns.append(_message(roles[match[1]], content))
    return turns


def _turn_marker(text: str) -> re.Pattern | None:
    """The pattern that marks the turns of a full text: the one that matches at its beginning."""
    for marker in TURN_MARKERS:
        if marker.match(text):
            return marker
    return None


def _format_of(record: dict, formats: dict[str, tuple], other_formats: dict[str, tuple], other_script: str) -> str:
    """The name of the one format whose keys the record has.

    Args:
        other_formats: formats that `other_script` reads, to tell users who took the wrong script.
    """
    matches = [name for name, keys in formats.items() if record.keys() >= set(keys)]
    # Where one format's keys include all of another's, the larger one is meant.
    matches = [name for name in matches if not any(set(formats[name]) < set(formats[other]) for other in matches)]
    listed = ", ".join(reprlib.repr(key) for key in list(record)[:12]) or "none"
    if len(record) > 12:
        listed += f" and {len(record) - 12} more"
    if len(matches) > 1:
        raise ValueError(f"has the keys {listed}, which fit {' and '.join(matches)}; keep those of one format only")
    if not matches:
        known = ", or ".join(" + ".join(map(repr, keys)) for keys in formats.values())
        message = f"has the keys {listed}; expected {known}"
        if any(record.keys() >= set(keys) for keys in other_formats.values()):
            message += f" (this record is for {other_script})"
        raise ValueError(message)
    if formats is PREFERENCES and "prompt" in record and "prompt" not in formats[matches[0]]:
        raise ValueError(
            f"has the keys {listed}: a separate prompt needs 'chosen' and 'rejected'; rename the two texts, or put the "
            "prompt into both of them"
        )
    return matches[0]


def _string(value, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can write it, UTF-8 cannot
        raise ValueError(f"{key!r} has half of a surrogate pair, which is no character; remove it")
    return value


def _text(value, key: str) -> Text:
    """A string, a list of messages, one message, or LMFlow's object with `messages` and perhaps `system`."""
    if isinstance(value, dict) and "role" in value:
        value = [value]  # one message is a list of one
    if isinstance(value, list):
        return _dialogue({key: value}, key)
    if isinstance(value, dict):
        return _dialogue(value, "messages")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string or a list of messages")
    return _string(value, key)


def _dialogue(holder: dict, key: str) -> list[Message]:
    """The checked messages in `holder[key]`, preceded by the system message in `holder["system"]`, if any."""
    value = holder.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a list of messages with 'role' and 'content'")
    if holder.get("tools"):
        raise ValueError("has 'tools', which are not supported; write them into the system message")
    messages = [_checked_message(message, f"{key} {n}") for n, message in enumerate(value, start=1)]
    if holder.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"has 'system', but {key!r} begin with a system message too; keep one of them")
        messages.insert(0, _message("system", _string(holder["system"], "system")))
    return messages


def _checked_message(message, key: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"{key!r} is {reprlib.repr(message)}; expected an object with 'role' and 'content'")
    if message.get("tool_calls"):
        raise ValueError(f"{key!r} has 'tool_calls', which are not supported; write them into its content")
    content = message["content"]
    # OpenAI's content parts, of which only text can be used here
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_string(part.get("text"), key) for part in content)
    return _message(_string(message["role"], key), _string(content, key))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _is_list_of_strings(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _responses(value) -> list[tuple[str, object]]:
    """(name for messages, response) of each response."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"'responses' is {reprlib.repr(value)}; expected a list of responses")
    return [(f"responses {n}", response) for n, response in enumerate(value, start=1)]


def _join(prompt: Text, response: Text, key: str, bare_as_dialogue: bool) -> Text:
    """The full text of a prompt and a response. A response of messages may contain the prompt already."""
    if isinstance(prompt, str) and isinstance(response, str):
        if not bare_as_dialogue:
            return prompt + response
        if _turn_marker(prompt):  # the prompt ends in "Assistant:", whose one space is part of the marker
            response = response.removeprefix(" ")
    prompt_messages = _prompt_messages(prompt) if isinstance(prompt, str) else prompt
    if isinstance(response, str):
        return [*prompt_messages, _message("assistant", response)]
    if response[0]["role"] == "assistant":
        return [*prompt_messages, *response]
    # The response is a whole dialogue, which has to begin with the prompt. A prompt that is a string has no system
    # message to compare.
    opening = response
    if isinstance(prompt, str):
        opening = [message for message in response if message["role"] != "system"]
    if opening[: len(prompt_messages)] != prompt_messages:
        raise ValueError(f"{key!r} begins with other messages than 'prompt'; remove 'prompt' if {key!r} is complete")
    return response


def _prompt_messages(prompt: str) -> list[Message]:
    """A prompt as messages, without the "Assistant:" at its end, after which the response belongs."""
    turns = split_turns(prompt) if _turn_marker(prompt) else [_message("user", prompt)]
    return turns[:-1] if turns[-1] == _message("assistant", "") else turns


def _grades(record: dict, keys: tuple[str, ...], n_responses: int) -> list[float] | None:
    """A grade for each response, higher is better; None where the record has neither ranks nor scores."""
    if "responses" not in keys:
        return [1.0, 0.0]  # chosen, rejected
    if keys[-1] == "responses":
        return None
    values = record[keys[-1]]
    if not isinstance(values, list) or len(values) != n_responses:
        raise ValueError(
            f"{keys[-1]!r} is {reprlib.repr(values)}; expected one number for each of {n_responses} responses"
        )
    grades = [_number(value, keys[-1]) for value in values]
    return grades if keys[-1] == "scores" else [-grade for grade in grades]  # rank 1 is the best


def _label_and_margin(record: dict, keys: tuple[str, ...]) -> tuple[float, float]:
    values = {key: _number(record[key], key) for key in ("label", "margin") if record.get(key) is not None}
    if values and "responses" in keys:
        raise ValueError(f"has {' and '.join(map(repr, values))}, which is only for pairs, not for rankings; remove it")
    label, margin = values.get("label", 1.0), values.get("margin", 0.0)
    if not 0 <= label <= 1:
        raise ValueError(f"'label' is {label:g}; expected the probability, 0 to 1, that the first text is better")
    return label, margin


def _number(value, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3e38 or math.isnan(value):
        raise ValueError(f"{key!r} has {reprlib.repr(value)}; expected finite numbers")  # finite as float32, too
    return float(value)
