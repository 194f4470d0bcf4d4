"""What a chat template has a place for. What it does not write would be lost, and is refused by name instead."""

from collections.abc import Callable
from functools import cached_property

from rm.data.messages import REASONING, WRITTEN, Message, assistant, user
from rm.data.reply_marks import PROBE

RESERVED = ("messages", "tools", "add_generation_prompt")  # names of variables that a record cannot set
MOST_SHAPES = 10_000  # of dialogues, that are remembered


class TemplatePlaces:
    """Finds out by examples what a template writes, and remembers it.

    Args:
        run: writes messages, with the variables of a record.
        source: the template's Jinja text.
        name: what error messages call it.
    """

    def __init__(self, run: Callable[..., str], source: str, name: str):
        self._run, self._source, self._name = run, source, name
        self._written: dict[str, bool] = {}  # what `_writes` has found out
        self._lost: dict[tuple, str | None] = {}  # what `_lost_of` has found out, by the shape of a dialogue

    def check(self, messages: list[Message], tools: list[dict] | None, variables: dict) -> None:
        """Raise ValueError where the template would pass over a thought, a call, tools, or a variable with text."""
        keys = {key for message in messages if len(message) > 2 for key in WRITTEN if key in message}
        for key in sorted(keys | ({"tools"} if tools else set())):
            if not self._writes(key):
                # A reply that is a call, and no text, would be empty without it.
                is_all = any(key in message and not message["content"] for message in messages)
                other = "or leave such records out" if is_all else f"or pass it over with --ignore_keys {key}"
                raise ValueError(
                    f"has {key!r}, for which {self._name} has no place: give a --chat_template that writes it, {other}"
                )
        for name, value in variables.items():
            carries_text = isinstance(value, str | list | dict) and value
            if name in RESERVED or (carries_text and name not in self._source):
                raise ValueError(
                    f"has {name!r} in 'chat_template_kwargs', for which {self._name} has no place: give a "
                    f"--chat_template that uses it, or --ignore_keys chat_template_kwargs"
                )

    def check_messages(self, messages: list[Message], variables: dict) -> None:
        """Raise ValueError where the template would pass over a whole message, the text beside a call, or a call.

        Many templates have no branch for messages of a tool or developer, and write nothing for these. Whether they do
        may depend on the messages before. So the dialogue is written once more, with a word in place of each text.
        Dialogues of one shape share what is found.

        Args:
            messages: as the template gets them.
        """
        shape = tuple((m["role"], bool(m["content"]), len(m.get("tool_calls", ()))) for m in messages)
        if not any(role not in ("user", "assistant") or calls for role, _, calls in shape):
            return
        shape += ("tools" in variables,)
        if shape not in self._lost:
            if len(self._lost) == MOST_SHAPES:
                self._lost.clear()
            self._lost[shape] = self._lost_of(messages, variables)
        if lost := self._lost[shape]:
            raise ValueError(
                f"has {lost}, for which {self._name} has no place: give a --chat_template that writes all of it, "
                f"{'name its role system, ' if lost == 'a message of developer' else ''}or leave such records out"
            )

    def _lost_of(self, messages: list[Message], variables: dict) -> str | None:
        """What of a dialogue the template does not write; None if there is nothing, or if it cannot be told."""
        words: dict[str, str] = {}  # in place of a text -> what that is
        probes = []
        for n, message in enumerate(messages):
            probe, calls = dict(message), message.get("tool_calls", [])
            if message["content"]:
                probe["content"] = word = f"qzprobe{n}text"
                words[word] = "a text beside a call" if calls else f"a message of {message['role']}"
            if calls:
                names = [f"qzprobe{n}call{i}x" for i in range(len(calls))]
                words |= dict.fromkeys(names, f"{len(calls)} calls in one message")
                probe["tool_calls"] = [
                    call | {"function": call["function"] | {"name": name}}
                    for call, name in zip(calls, names, strict=True)
                ]
            probes.append(probe)
        try:
            text = self._run(probes, variables)
        except ValueError:  # it refuses the dialogue itself, or reads what messages say
            return None
        return next((lost for word, lost in words.items() if word not in text), None)

    def _writes(self, key: str) -> bool:
        """Whether the template writes a key of messages, or tools, at least in some place of a dialogue."""
        if key not in self._written:
            function = {"name": PROBE, "arguments": {}}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            tool = {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
            probes = {
                "tool_calls": {"tool_calls": [call]},
                "function_call": {"function_call": function},
                "tools": {},
            }
            variables = {"tools": [{"type": "function", "function": tool}]} if key == "tools" else {}
            reply = assistant("") | probes.get(key, dict.fromkeys(REASONING, PROBE))
            try:
                self._written[key] = PROBE in self._run([user("a"), reply], variables)
            except ValueError:  # it needs more than the probe has
                self._written[key] = key in self._source
        return self._written[key]

    @cached_property
    def takes_strings(self) -> bool:
        """Whether the template takes the arguments of a call as a string of JSON, as OpenAI has them."""
        function = {"name": "a", "arguments": '{"b": 1}'}
        reply = assistant("") | {"tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}
        try:
            return '\\"b' not in self._run([user("a"), reply])  # it would write the string in quotes
        except ValueError:
            return False
