"""Texts and messages: every public spelling of a dialogue becomes a list of messages as chat templates take them.

A text is plain (a string, taken as it is) or a dialogue: a list of messages, which a chat template writes as a string
(`rm.data.chat`). A message has a `role` and a `content`, and may have the other keys of MESSAGE_KEYS, which are passed
to the template as they are. The functions raise ValueError without naming the record, which only the caller knows.
"""

import ast
import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from rm.data.key_names import REASONING, WRITTEN, is_lost

Message = dict[str, object]  # {"role": "user", "content": "hi"}; the role and the content are strings
Text = str | list[Message]

# How data sets spell the roles. Sources: axolotl (prompt_strategies/chat_template.py), ms-swift (dataset/preprocessor/
# core.py), LLaMA-Factory (data/converter.py), open-assistant ("prompter").
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "function",  # OpenAI's older name; templates that know it write it in their own way
    "ipython": "ipython",
    "environment": "environment",
}
CALLS = ("function_call", "tool_call")  # roles of messages whose content is a call in JSON (ShareGPT)
CONTENTS = ("content", "value", "text")  # keys that hold what a message says
TEXT_PARTS = ("text", "input_text", "output_text")  # types of its parts; the others: OpenAI's Responses
PART_TEXTS = ("text", "value", "content")  # keys that hold what a part of it says

# What a template may write besides role and content
MESSAGE_KEYS = (*WRITTEN, "name", "tool_call_id")
# Whether a reply carries loss: OpenAI, axolotl, ms-swift, LLaMA-Factory v1, tinker; torchtune's is the opposite
LOSS_KEYS = ("weight", "train", "training", "loss", "loss_weight", "trainable")
MASKED = "masked"
# Keys of a message that carry text or meaning, and are not supported
UNSUPPORTED = (
    "image", "images", "video", "videos", "audio", "audios", "documents", "context", "thought", "thoughts",
    "loss_scale", "train_detail", "training_detail", "prefix", "refusal", "system", "tools",
)  # fmt: skip

# Strings that may be messages, and the keys that messages have
MESSAGES_BEGIN = re.compile(r"""\s*(\[\s*\{|\{\s*["'](role|from|content|value)["']\s*:)""")
OBJECT_BEGINS = re.compile(r"\s*\{")
MESSAGE_HAS = [re.compile(rf"""["']({names})["']\s*:""") for names in ("role|from", "content|value")]

# What marks a turn at the beginning of a full text, and later in it. Patterns that begin with fixed text are fast.
TURN_MARKERS = {
    re.compile(r"(?:\n\n)?(Human|Assistant):"): re.compile(r"\n\n(Human|Assistant):"),  # Anthropic
    re.compile(r"###(Human|Assistant):"): re.compile(r"###(Human|Assistant):"),  # LMFlow
}


@dataclass
class Seen:
    """What reading messages passes over or finds besides them; it grows while a record is read.

    Attributes:
        ignore: keys of messages that the user wants passed over.
        passed_over: keys of messages that have no meaning here.
        ignored: of `ignore`, the keys that were there.
        without_loss: positions of the messages that are not to carry loss, in the last list that was read.
    """

    ignore: frozenset[str] = frozenset()
    passed_over: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    without_loss: set[int] = field(default_factory=set)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def string(value, key: str) -> str:
    """A string that UTF-8 can write."""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can write it, UTF-8 cannot
        raise ValueError(f"{key!r} has half of a surrogate pair, which is no character; remove it")
    return value


def text(value, key: str, seen: Seen, objects: bool = True) -> Text:
    """A string, one message, or a list of messages; also messages written as JSON in a string.

    Args:
        objects: a string with an object in it may be one message. Else it is what somebody said.
    """
    if isinstance(value, dict) and role_of(value) is not None:
        value = [value]  # one message is a list of one
    if isinstance(value, list):
        return dialogue(value, key, seen)
    if isinstance(value, str) and MESSAGES_BEGIN.match(value) and (objects or not OBJECT_BEGINS.match(value)):
        if (messages := messages_in(value)) is not None:
            return dialogue(messages, key, seen)
        if _looks_like_messages(value):
            raise ValueError(
                f"{key!r} is {reprlib.repr(value)}, which looks like messages, but is neither JSON nor a list in "
                f"Python's notation; write the data as JSON lines or Parquet"
            )
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string or a list of messages")
    return string(value, key)


def may_be_one_message(value) -> bool:
    """Whether a value is no string, or one that holds an object."""
    return not isinstance(value, str) or OBJECT_BEGINS.match(value) is not None


def messages_in(value: str) -> list | None:
    """The messages that a string holds, as JSON or in Python's notation (pandas writes it); None for any other."""
    if not MESSAGES_BEGIN.match(value):
        return None
    found = _literal(value)
    if isinstance(found, dict):  # one message
        found = [found] if str(role_of(found)).lower() in ROLES else None
    return found if isinstance(found, list) and found and all(map(_is_message, found)) else None


def _is_message(value) -> bool:
    return isinstance(value, dict) and role_of(value) is not None and bool(value.keys() & {*CONTENTS, *WRITTEN})


def _literal(value: str):
    """What a string holds in JSON or in Python's notation; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _looks_like_messages(value: str) -> bool:
    """Whether a string that begins as messages do is damaged: pandas writes arrays without commas."""
    return all(pattern.search(value) for pattern in MESSAGE_HAS) and _literal(value) is None


def dialogue(value, key: str, seen: Seen) -> list[Message]:
    """The checked messages of a list, or of its JSON. Some data sets have pairs of turns in place of messages."""
    if isinstance(value, str):
        value = messages_in(value) or value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a list of messages with 'role' and 'content'")
    seen.without_loss.clear()
    messages = []
    for n, entry in enumerate(value, start=1):
        if isinstance(entry, dict) and (turns := _pair_of_turns(entry, f"{key} {n}", seen)):
            messages += [user(string(turns[0], f"{key} {n}")), assistant(string(turns[1], f"{key} {n}"))]
            continue
        message, carries_loss = _message(entry, f"{key} {n}", seen)
        if not carries_loss:
            seen.without_loss.add(len(messages))
        messages.append(message)
    return messages


def _pair_of_turns(entry: dict, key: str, seen: Seen) -> tuple | None:
    """(what the user says, what the assistant says) of Capybara's and ms-swift's pairs."""
    for keys in (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("human", "gpt")):
        if all(name in entry for name in keys):
            for name in entry.keys() - set(keys):
                _check_unread(name, entry[name], key, seen)
            return tuple(entry[name] for name in keys)
    return None


def _check_unread(name: str, value, key: str, seen: Seen) -> None:
    """Refuse a key of a pair of turns, or of a part of a message, that would have an effect in a message."""
    if name in seen.ignore:
        seen.ignored.add(name)
    elif name in (*LOSS_KEYS, MASKED, *UNSUPPORTED, *WRITTEN, *CONTENTS) and without_nulls(value) not in (
        None,
        "",
        [],
        1,
    ):
        raise ValueError(f"{key!r} has {name!r}, which is not supported there: write messages, or --ignore_keys {name}")
    else:
        seen.passed_over.add(name)


def role_of(message: dict) -> str | None:
    """What stands under `role`, or, in ShareGPT's spelling, under `from`."""
    role = message.get("role")
    role = message.get("from") if role is None else role
    return role if isinstance(role, str) else None


def _message(value, key: str, seen: Seen) -> tuple[Message, bool]:
    """(the message, whether it may carry loss)"""
    names = [name for name in CONTENTS if name in value] if isinstance(value, dict) else []
    content_key = next((name for name in names if value[name] is not None), names[0] if names else None)
    if content_key is None and isinstance(value, dict) and value.keys() & {"tool_calls", "function_call"}:
        content_key = "content"  # a call may have no content
    if content_key is None or role_of(value) is None:
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected an object with 'role' and 'content'")
    spelled = string(role_of(value), key)
    if spelled.lower() in CALLS:
        others = {name: entry for name, entry in value.items() if name not in (content_key, "role", "from")}
        value = others | {"role": "assistant", "tool_calls": _calls(value[content_key], key)}
        return _message_with_more(value, "assistant", "content", key, seen)
    role = ROLES.get(spelled.lower())
    if role is None:
        raise ValueError(f"{key!r} has the role {reprlib.repr(spelled)}; expected one of {', '.join(ROLES)}")
    if len(value) == 2 and content_key in value:  # most messages
        return {"role": role, "content": _content(value[content_key], key, seen)}, True
    return _message_with_more(value, role, content_key, key, seen)


def _message_with_more(value: dict, role: str, content_key: str, key: str, seen: Seen) -> tuple[Message, bool]:
    """A message that has more than a role and a content."""
    message, carries_loss = {"role": role}, True
    for name, entry in value.items():
        if name == content_key or name == "role":
            continue
        if name == "from":
            _check_from(entry, role, key)
            continue
        if name in seen.ignore:
            seen.ignored.add(name)
            continue
        entry = without_nulls(entry)
        if entry is None or entry == [] or entry == "":  # an absent key, as Parquet and `datasets` write it
            continue
        if name in LOSS_KEYS:
            carries_loss = _carries_loss(entry, name, key)
        elif name == MASKED:
            carries_loss = not _carries_loss(entry, name, key)
        elif name in UNSUPPORTED:
            raise ValueError(
                f"{key!r} has {name!r}, which is not supported: remove it, or pass it over with --ignore_keys {name}"
            )
        elif name in MESSAGE_KEYS:
            message[name] = string(entry, f"{key} {name}") if name in (*REASONING, "name", "tool_call_id") else entry
        elif name in CONTENTS and entry == value.get(content_key):
            continue
        elif name in CONTENTS or is_lost(name, entry):
            raise ValueError(f"{key!r} has {name!r}, which is not used there: pass it over with --ignore_keys {name}")
        else:
            seen.passed_over.add(name)
    if len({message[name] for name in REASONING if name in message}) > 1:
        raise ValueError(f"{key!r} has several thoughts, under {' and '.join(REASONING)}: keep one")
    content = value.get(content_key)
    has_call = "tool_calls" in message or "function_call" in message
    if content is None and (ignored := seen.ignore & value.keys() & {"tool_calls", "function_call"}):
        raise ValueError(
            f"{key!r} is a call without content, of which --ignore_keys {min(ignored)} leaves nothing: give a "
            f"--chat_template that writes calls, or leave such records out"
        )
    message["content"] = "" if content is None and has_call else _content(content, key, seen)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], key)
    return message, carries_loss


def _check_from(value, role: str, key: str) -> None:
    """Refuse a `from` that names another role than `role` does; it may also be a name."""
    other = ROLES.get(value.lower()) if isinstance(value, str) else None
    if other not in (None, role):
        raise ValueError(f"{key!r} is a message of {role}, but has 'from' {value!r}: remove one, or --ignore_keys from")


def _content(value, key: str, seen: Seen) -> str:
    """The text of a message. It may consist of parts, as OpenAI's do, of which only text can be used here."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        said = []
        for part in value:
            if part.get("type") not in TEXT_PARTS:
                raise ValueError(f"{key!r} has a part of type {reprlib.repr(part.get('type'))}; only text is read")
            of_text = next((name for name in PART_TEXTS if part.get(name) is not None), "text")
            said.append(string(part.get(of_text), key))
            for name in part.keys() - {"type", of_text}:
                _check_unread(name, part[name], f"{key}, a part", seen)
        value = "".join(said)
    return string(value, key)


def _carries_loss(value, name: str, key: str) -> bool:
    if value in (0, 1):  # also false and true
        return bool(value)
    raise ValueError(f"{key!r} has {name!r} {reprlib.repr(value)}; expected 0 or 1, false or true")


def _calls(value, key: str) -> list[dict]:
    """The calls of a reply that has no other content: {"name": ..., "arguments": ...} in JSON, or a list of these."""
    expected = f'{key!r} is {reprlib.repr(value)}; expected a call in JSON: {{"name": ..., "arguments": ...}}'
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(expected) from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(expected)
    return calls


def _tool_calls(value, key: str) -> list[dict]:
    """Calls in the form that templates take: {"type": "function", "function": {"name": ..., "arguments": ...}}."""
    value = parsed(value)
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"{key!r} has 'tool_calls' {reprlib.repr(value)}; expected a list of objects")
    calls = [{"type": "function", "function": call} if "name" in call else call for call in value]
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{key!r} has the tool call {reprlib.repr(call)}; expected a function with a name")
    return calls


def tools_in(value, key: str) -> list[dict] | None:
    """Descriptions of tools, also as JSON in a string, in the form that templates take; None if there are none."""
    value = without_nulls(parsed(value))
    if not value or value in ([""], "[]"):  # LMFlow writes [""]
        return None
    if isinstance(value, list):
        value = [parsed(tool) for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a list of tools, each an object")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in value]


def parsed(value):
    """What a string holds in JSON, or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def without_nulls(value):
    """A value without the nulls in its objects: Parquet has them for every key that another record has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def split_turns(text: str) -> list[Message]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic) or "###Human: ...###Assistant: ..." (LMFlow) into turns.

    One space after a colon is part of the marker.
    """
    first = turn_marker(text)
    if first is None:
        expected = '"\\n\\nHuman: ...\\n\\nAssistant: ..." or "###Human: ...###Assistant: ..."'
        raise ValueError(f"{reprlib.repr(text)} is no dialogue; for a chat template a text must have turns: {expected}")
    pieces = [first[1], *TURN_MARKERS[first.re].split(text[first.end() :])]  # whose, what, whose, what, ...
    make = {"Human": user, "Assistant": assistant}
    return [make[name](said.removeprefix(" ")) for name, said in zip(pieces[::2], pieces[1::2], strict=True)]


HELPSTEER_TURN = "<extra_id_1>"


def split_helpsteer(prompt: str) -> list[Message]:
    """The turns of "first question\n<extra_id_1>Assistant\nits reply\n<extra_id_1>User\nnext question".

    NeMo's prompts begin with "<extra_id_0>System\n", a system message and a turn of the user.
    """
    first, *turns = prompt.split(HELPSTEER_TURN)
    system = first.removeprefix("<extra_id_0>System\n")
    dialogue = [user(first.strip())]
    if system != first:
        dialogue = [{"role": "system", "content": system.strip()}] if system.strip() else []
    make = {"Assistant": assistant, "User": user}
    for turn in turns:
        role, _, content = turn.partition("\n")
        if role.strip() not in make:
            raise ValueError(f"has a turn of {role.strip()!r} behind {HELPSTEER_TURN}; expected User or Assistant")
        dialogue.append(make[role.strip()](content.strip()))
    if dialogue and dialogue[-1] == assistant(""):
        del dialogue[-1]
    return dialogue


def turn_marker(text: str) -> re.Match | None:
    """What marks the first turn of a full text; None if a text has no marked turns."""
    matches = (marker.match(text) for marker in TURN_MARKERS)
    return next(filter(None, matches), None)


def prompt_of(value: str) -> Text:
    """A prompt, which is a dialogue where it has HelpSteer's marks of turns."""
    return split_helpsteer(value) if HELPSTEER_TURN in value else value


def prompt_messages(prompt: str) -> list[Message]:
    """A prompt as messages, without the "Assistant:" at its end, after which the reply belongs."""
    turns = split_turns(prompt) if turn_marker(prompt) else [user(prompt)]
    return turns[:-1] if turns[-1] == assistant("") else turns


def strings_in(value) -> list[str]:
    """What a text or a list of messages says, without white space around it: its strings, and those of its messages."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict):
        names = ("input", *CONTENTS, *REASONING)  # `input`: of a pair of turns
        return [s for name in names if value.get(name) for s in strings_in(value[name])]
    return [s for entry in value for s in strings_in(entry)] if isinstance(value, Sequence) else []
