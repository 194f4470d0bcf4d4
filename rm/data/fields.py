"""The values of a record: its prompt, system message, history and tools, under every name that data sets have for them.

A `Fields` remembers which keys were read, so that what a schema passes over is known (`rm.data.schemas`).
"""

import math
import reprlib
from collections.abc import Sequence

from rm.data import messages
from rm.data.key_names import DIALOGUES, PROMPTS, SYSTEMS, TOOLS, is_lost
from rm.data.messages import Message, Seen, Text, assistant, string, user, without_nulls
from rm.data.sample import Bare


class Fields:
    """A record's values, which remembers those that were read."""

    def __init__(self, record: dict, seen: Seen):
        self.record, self.seen = record, seen
        self.used: set[str] = set()
        self.prompt_key: str | None = None  # that the prompt was found under

    def get(self, key: str):
        self.used.add(key)
        return self.record.get(key)

    def text(self, key: str) -> Text:
        return messages.text(self.get(key), key, self.seen)

    def string(self, key: str) -> str:
        return string(self.get(key), key)

    def first_of(self, keys: Sequence[str]) -> str | None:
        """The first of these keys that the record has with a value that is not empty."""
        return next((key for key in keys if key in self.record and not is_empty(self.record[key])), None)

    def system(self) -> str | None:
        key = self.first_of(SYSTEMS)
        return None if key is None else self.string(key)

    def tools(self) -> list[dict] | None:
        key = self.first_of(TOOLS)
        return None if key is None else messages.tools_in(self.get(key), key)

    def template_kwargs(self) -> dict:
        value = without_nulls(self.get("chat_template_kwargs")) or {}
        if not isinstance(value, dict):
            raise ValueError(f"'chat_template_kwargs' is {reprlib.repr(value)}; expected an object")
        thinking = self.get("enable_thinking")  # a column of verl's
        if thinking is None:
            return value
        if not isinstance(thinking, bool):
            raise ValueError(f"'enable_thinking' is {reprlib.repr(thinking)}; expected true or false")
        return {"enable_thinking": thinking} | value

    def attributes(self, record: dict, names: Sequence[str]) -> tuple[float, ...]:
        """The numbers with these names, in the record or in its `attributes`; nan for one that it lacks."""
        if not names:
            return ()
        self.used.update(("attributes", *names))
        inner = messages.parsed(record.get("attributes", {}))
        if not isinstance(inner, dict):
            raise ValueError(f"'attributes' is {reprlib.repr(inner)}; expected an object of names and numbers")
        self.seen.passed_over |= {f"attributes.{name}" for name in inner.keys() - set(names)}
        if twice := [name for name in names if name in inner and name in record]:
            raise ValueError(f"has {twice[0]!r} twice, by itself and in 'attributes': remove one")
        values = ((name, (inner | record).get(name)) for name in names)
        return tuple(math.nan if value in (None, "") else number(value, name) for name, value in values)  # "": of CSV

    def prompt(self, is_whole: bool = False) -> Text | None:
        """What the replies answer, with the system message and the history; None if the record has no prompt.

        Args:
            is_whole: the replies are whole dialogues, so that other dialogues in the record are none of their prompt.
        """
        system, key = self.system(), self.first_of(PROMPTS if is_whole else ("prompt", *DIALOGUES, *PROMPTS))
        self.prompt_key, prompt = key, None if key is None else self._prompt(key)
        if turns := self.history():
            prompt = [*turns, *as_messages(prompt)]
        if system is not None:
            prompt = with_system(system, as_messages(prompt), key or "prompt")
        return prompt

    def check_inner(self, value: dict, key: str, known: Sequence[str]) -> None:
        """Refuse the keys of an object in a record that carry text or meaning, and that nothing reads."""
        self.seen.ignored |= value.keys() & self.seen.ignore
        for name in sorted(value.keys() - set(known) - self.seen.ignore):
            if value[name] is not None and not is_empty(value[name]) and is_lost(name, value[name]):
                raise ValueError(f"{key!r} has {name!r}, which is not used: pass it over with --ignore_keys {name}")
            self.seen.passed_over.add(f"{key.partition(' ')[0]}.{name}")

    def _prompt(self, key: str) -> Text:
        prompt = self.text(key) if key not in DIALOGUES else messages.dialogue(self.get(key), key, self.seen)
        # Alpaca's and Dolly's instructions, and what they are about
        more = self.first_of(("input", "context")) if key == "instruction" else None
        if more is not None and isinstance(prompt, str):
            prompt = f"{prompt}\n{self.string(more)}"
        return messages.prompt_of(prompt) if isinstance(prompt, str) else prompt

    def history(self) -> list[Message]:
        """Earlier turns: pairs of strings (LLaMA-Factory), or messages."""
        history = self.get("history") or []
        if not isinstance(history, list):
            raise ValueError(f"'history' is {reprlib.repr(history)}; expected a list of earlier turns")
        if all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            contents = [string(content, "history") for turn in history for content in turn]
            return [(user, assistant)[n % 2](content) for n, content in enumerate(contents)]
        return messages.dialogue(history, "history", self.seen)


def as_messages(prompt: Text | None) -> list[Message]:
    if prompt is None:
        return []
    return messages.prompt_messages(prompt) if isinstance(prompt, str) else prompt


def with_system(system: str, dialogue: list[Message], key: str) -> list[Message]:
    if dialogue and dialogue[0]["role"] == "system":
        if dialogue[0]["content"].strip() == system.strip():
            return dialogue
        raise ValueError(f"has a system message, but {key!r} begins with another one; keep one of them")
    return [{"role": "system", "content": system}, *dialogue]


def join(prompt: Text | None, reply: Text, key: str) -> Text | Bare:
    """The full text of a prompt and a reply. A reply of messages may contain the prompt already."""
    if prompt is None:
        return reply
    if isinstance(reply, str) and isinstance(prompt, str):
        if messages.turn_marker(prompt):
            if reply.startswith(prompt.rstrip()):
                return reply
            if reply.strip() and prompt.rstrip().endswith(f"Assistant: {reply.strip()}"):
                raise ValueError(_has_reply(key))
        if not _is_full(reply):
            return Bare(prompt, reply)
        if prompt.strip() not in reply:
            raise ValueError(_lacks_prompt(key))
        return reply
    if isinstance(reply, str):
        if not _is_full(reply):
            if prompt and reply and prompt[-1] == assistant(reply):
                raise ValueError(_has_reply(key))
            return [*prompt, assistant(reply)]
        reply = messages.split_turns(reply)
    turns = as_messages(prompt)
    if reply[0]["role"] == "assistant":
        if turns and turns[-1] == reply[0]:
            raise ValueError(_has_reply(key))
        return [*turns, *reply]
    # The reply is a whole dialogue. What the prompt says has to be in it, as its beginning or its last turn.
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    if system and reply[0]["role"] != "system":
        reply, turns = [*system, *reply], turns[1:]
    contents = [message["content"].strip() for message in reply]
    if not all(message["content"].strip() in contents for message in turns):
        raise ValueError(_lacks_prompt(key))
    return reply


def _lacks_prompt(key: str) -> str:
    return f"{key!r} is a whole dialogue, but lacks what 'prompt' says; if it is complete: --ignore_keys prompt"


def _has_reply(key: str) -> str:
    return f"has a prompt that ends with the reply of {key!r}, which would stand there twice; end it before the reply"


def _is_full(text: str) -> bool:
    """Whether a string is a full text of marked turns, from the user's first on."""
    first = messages.turn_marker(text)
    return first is not None and first[1] == "Human"


def is_whole(value) -> bool:
    """Whether a reply is a whole dialogue, which needs no prompt."""
    value = messages.messages_in(value) if isinstance(value, str) else value
    first = value[0] if isinstance(value, list) and value else None
    role = messages.role_of(first) if isinstance(first, dict) else None
    return role is not None and messages.ROLES.get(role.lower()) not in ("assistant", None)


def number(value, key: str) -> float:
    if isinstance(value, str):  # a CSV file has nothing but strings
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool):
        raise ValueError(f"{key!r} is {str(value).lower()}; expected a number: write 1 for true and 0 for false")
    if not isinstance(value, int | float) or not abs(value) < 3e38 or math.isnan(value):
        raise ValueError(f"{key!r} has {reprlib.repr(value)}; expected finite numbers")  # finite as float32, too
    return float(value)


def is_empty(value) -> bool:
    return without_nulls(value) in ("", [], {}, [""])


def is_list_of_strings(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)
