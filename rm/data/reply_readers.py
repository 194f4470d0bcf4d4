"""Reads replies to compare, in the forms that many data sets share: functions from a record's values to a sample."""

import reprlib
from collections.abc import Callable
from dataclasses import replace

from rm.data import messages
from rm.data.fields import Fields, as_messages, is_list_of_strings, is_whole, join, number, with_system
from rm.data.key_names import DIALOGUES
from rm.data.messages import Message, Seen, Text, string
from rm.data.sample import Bare, Sample

# What means that a reply is the better one of two, in the columns called winner, label, preference
FIRST = {"a", "model_a", "response_a", "a>b", "a>>b", "assistant_a", "model_1", "response_1"}
SECOND = {"b", "model_b", "response_b", "b>a", "b>>a", "assistant_b", "model_2", "response_2"}
TIE = {"tie", "tied", "draw", "both", "both_good", "both_bad", "bothbad", "tie_(bothbad)", "a=b", "equal", "neither"}


def compared(
    fields: Fields, replies: list[tuple[str, object]], grade: list[float] | None, label: float = 1.0
) -> Sample:
    """The sample of a prompt's replies.

    Args:
        replies: (what to call it in messages, the reply as it is in the record) of each.
    """
    whole = [is_whole(value) for _, value in replies]
    prompt = fields.prompt(is_whole=any(whole))
    if isinstance(prompt, list) and fields.prompt_key in DIALOGUES and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"has {fields.prompt_key!r} that end with a reply, behind which no other one can stand; remove it, or pass "
            f"them over with --ignore_keys {fields.prompt_key}"
        )
    objects = not isinstance(prompt, str) and all(messages.may_be_one_message(value) for _, value in replies)
    texts, tools = [], fields.tools()
    for key, value in replies:
        if isinstance(value, dict) and "messages" in value:  # LMFlow's dialogues have a system message and tools
            fields.check_inner(value, key, ("messages", "system", "tools", "conversation_id"))
            reply, own_tools = _lmflow_dialogue(value, key, fields.seen)
            if own_tools != tools and texts:
                raise ValueError("has other tools on its two sides, which would reveal the better one")
            tools = own_tools
        else:
            reply = messages.text(value, key, fields.seen, objects)
        texts.append(join(prompt, reply, key))
    turns = as_messages(prompt)
    if any(whole) and not all(whole) and not all(_continues(text, turns) for text in texts):
        raise ValueError("has replies that are whole dialogues, and others that lack the turns of these; add them")
    return Sample("", texts, grade, label, tools=tools, template_kwargs=fields.template_kwargs())


def _continues(text: Text | Bare, turns: list[Message]) -> bool:
    """Whether a text is a prompt of these turns and a reply."""
    text = text.dialogue() if isinstance(text, Bare) else text
    contents = [[message["content"].strip() for message in part] for part in (text[: len(turns)], turns)]
    return bool(turns) and contents[0] == contents[1] and text[len(turns)]["role"] == "assistant"


def _lmflow_dialogue(value: dict, key: str, seen: Seen) -> tuple[list[Message], list[dict] | None]:
    dialogue = messages.dialogue(value["messages"], f"{key} messages", seen)
    if value.get("system"):
        dialogue = with_system(string(value["system"], f"{key} system"), dialogue, f"{key} messages")
    return dialogue, messages.tools_in(value.get("tools"), f"{key} tools")


def pair(better: str, worse: str) -> Callable[[Fields], Sample]:
    """Reads a pair whose better reply stands under one key and whose worse one under another."""

    def read(fields: Fields) -> Sample:
        chosen, rejected = (answer_of(fields.get(key), key, fields) for key in (better, worse))
        if isinstance(chosen, str) and chosen in fields.record:
            raise ValueError(f"{better!r} is {chosen!r}, the name of another key: --data_keys winner={better}")
        if is_list_of_strings(chosen) and is_list_of_strings(rejected):  # RewardBench 2, RM-Bench: many of each
            replies = [(f"{better} {n}", reply) for n, reply in enumerate(chosen, 1)]
            replies += [(f"{worse} {n}", reply) for n, reply in enumerate(rejected, 1)]
            return compared(fields, replies, [1.0] * len(chosen) + [0.0] * len(rejected))
        label, margin = number_or(1.0, fields, "label"), number_or(0.0, fields, "margin")
        if not 0 <= label <= 1:
            raise ValueError(f"'label' is {label:g}; expected the probability, 0 to 1, that the first text is better")
        sample = compared(fields, [(better, chosen), (worse, rejected)], [1.0, 0.0], label)
        return replace(sample, margin=margin) if margin else sample

    return read


def number_or(default: float, fields: Fields, key: str) -> float:
    """A number, or the default where a record has none, or an empty field of a CSV file."""
    value = fields.get(key)
    return default if value is None or value == "" else number(value, key)


def answer_of(value, key: str, fields: Fields):
    """A reply that is an object of its text and the model it came from (RMB), as its text."""
    if not isinstance(value, dict) or not isinstance(value.get("answer"), str):
        return value
    fields.check_inner(value, key, ("answer", "llm_name"))
    return value["answer"]


def two(fields: Fields, first: str, second: str, preferred: float) -> Sample:
    """A pair of replies, of which the first is better where `preferred` is positive; 0 is a tie."""
    sides, label = better_first([(key, fields.get(key)) for key in (first, second)], preferred)
    return compared(fields, sides, [1.0, 0.0], label)


def better_first(sides: list, preferred: float) -> tuple[list, float]:
    """(two sides, the better one first, the label of the pair); the first is better where `preferred` is positive."""
    return (sides[::-1] if preferred < 0 else sides), (1.0 if preferred else 0.5)


def unjudged(first: str, second: str) -> Callable[[Fields], Sample]:
    """Reads two replies of which nothing says which is better."""
    return lambda fields: compared(fields, [(key, fields.get(key)) for key in (first, second)], None)


def voted(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and a word that says which is better."""

    def read(fields: Fields) -> Sample:
        return two(fields, first, second, verdict(fields.get(key), key, first, second))

    return read


def verdict(value, key: str, first: str, second: str) -> float:
    """1 for the first, -1 for the second, 0 for a tie."""
    word = "_".join(str(value).strip().lower().split())
    if word in FIRST or word == first.lower():
        return 1.0
    if word in SECOND or word == second.lower():
        return -1.0
    if word in TIE or word.startswith("tie_("):
        return 0.0
    raise ValueError(
        f"{key!r} is {reprlib.repr(value)}; expected {first} or a, {second} or b, or tie (numbers and other names "
        f"may mean either)"
    )


def signed(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and a number from -3 to 3, negative where the first is better (HelpSteer).

    How far it is from 0 is the strength of the preference.
    """

    def read(fields: Fields) -> Sample:
        preferred = number(fields.get(key), key)
        if not -3 <= preferred <= 3:
            raise ValueError(f"{key!r} is {preferred:g}; expected -3 (the first is better) to 3 (the second is)")
        return replace(two(fields, first, second, -preferred), strength=abs(preferred))

    return read


def by_index(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and the index, 0 or 1, of the better one; -1 is a tie."""

    def read(fields: Fields) -> Sample:
        index = number(fields.get(key), key)
        if index not in (-1, 0, 1):
            raise ValueError(f"{key!r} is {index:g}; expected 0 or 1, the index of the better reply, or -1")
        return two(fields, first, second, 0.0 if index == -1 else 1.0 - 2.0 * index)

    return read


def numbered(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and the number, 1 or 2, of the better one."""

    def read(fields: Fields) -> Sample:
        better = number(fields.get(key), key)
        if better not in (1, 2):
            raise ValueError(f"{key!r} is {better:g}; expected 1 or 2, the number of the better reply")
        return two(fields, first, second, 3.0 - 2.0 * better)

    return read


def conversations(first: str, second: str) -> Callable[[Fields], Sample]:
    """Reads two whole dialogues and the winner; MT-Bench's are judged at a `turn`, up to which they are read."""

    def read(fields: Fields) -> Sample:
        turn = fields.get("turn")
        sides = [messages.dialogue(fields.get(key), key, fields.seen) for key in (first, second)]
        if turn is not None:
            sides = [_up_to(side, number(turn, "turn")) for side in sides]
        if (winner := fields.get("winner")) is None:
            return Sample("", sides)
        sides, label = better_first(sides, verdict(winner, "winner", first, second))
        return Sample("", sides, [1.0, 0.0], label)

    return read


def _up_to(dialogue: list[Message], turn: float) -> list[Message]:
    """A dialogue up to the reply of this number."""
    replies = [i for i, message in enumerate(dialogue) if message["role"] == "assistant"]
    if turn not in range(1, len(replies) + 1):
        raise ValueError(f"'turn' is {turn:g}; expected the number of a reply, 1 to {len(replies)}")
    return dialogue[: replies[int(turn) - 1] + 1]


def scored_list(key: str, text: str, grade: str) -> Callable[[Fields], Sample]:
    """Reads a list of objects that hold a reply and its score, higher for better."""

    def read(fields: Fields) -> Sample:
        entries = fields.get(key)
        for n, entry in enumerate(entries, 1):
            fields.check_inner(entry, f"{key} {n}", (text, grade))
        replies = [(f"{key} {n}", entry.get(text)) for n, entry in enumerate(entries, 1)]
        return compared(fields, replies, [number(entry.get(grade), grade) for entry in entries])

    return read


def ranked_list(key: str, text: str, rank: str) -> Callable[[Fields], Sample]:
    """Reads a list of objects that hold a reply and its rank, lower for better."""
    read_scored = scored_list(key, text, rank)

    def read(fields: Fields) -> Sample:
        sample = read_scored(fields)
        return replace(sample, grade=[-rank for rank in sample.grade])

    return read


def responses(grades: str | None) -> Callable[[Fields], Sample]:
    """Reads `responses`, and `ranks` (1 is the best) or `scores`, if there are any."""

    def read(fields: Fields) -> Sample:
        values = messages.parsed(fields.get("responses"))
        if not isinstance(values, list) or not values:
            raise ValueError(f"'responses' is {reprlib.repr(values)}; expected a list of responses")
        grade = None if grades is None else grades_in(fields.get(grades), grades, len(values))
        if grades == "ranks":
            grade = [-rank for rank in grade]
        return compared(fields, [(f"responses {n}", value) for n, value in enumerate(values, 1)], grade)

    return read


def grades_in(values, key: str, n: int) -> list[float]:
    values = messages.parsed(values)
    if not isinstance(values, list) or len(values) != n:
        raise ValueError(f"{key!r} is {reprlib.repr(values)}; expected one number for each of {n} responses")
    return [number(value, key) for value in values]


def best_first(fields: Fields) -> Sample:
    replies = [(f"output {n}", reply) for n, reply in enumerate(fields.get("output"), 1)]
    return compared(fields, replies, [float(len(replies) - n) for n in range(len(replies))])
