"""Dialogues to text: chat templates, and where in the text they write the assistant speaks.

A template is a program in Jinja that comes with a model; it runs in a sandbox, with the helpers that transformers
gives it. Two things it does not tell are found out here:

*Which special tokens are its own.* "<|im_end|>" ends a turn where the template writes it and is ten characters where a
user typed it. So what was typed is disguised before the template sees it; what is special afterwards is the
template's and leaves here as an id, between strings (`Parts`).

*Where the assistant speaks.* A template may say so ({% generation %}); few do. For the others every reply is put
between two marks, and the text must be the same, but for the marks, as without them.

A text ends with the token that ends its last turn. Where a template writes none, `rm.data.dataset` appends EOS.
"""

import datetime
import hashlib
import json
import re
import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from rm.data.formats import Message
from rm.data.tokenizer import Parts, Tokenizer

_TURNS = (
    "{%% for m in messages %%}{%% if m.role not in ['user', 'assistant'] %%}"
    "{{ raise_exception('it has no place for a message of ' ~ m.role) }}{%% endif %%}"
    "{{ ('%s' if m.role == 'user' else '%s') + m.content }}{%% endfor %%}"
)
DIALOGUE_FORMATS = {
    "hh": _TURNS % ("###Human: ", "###Assistant: "),
    "anthropic": _TURNS % (r"\n\nHuman: ", r"\n\nAssistant: "),
}
TODAY = datetime.datetime(2024, 7, 26)  # for templates that write the date: one text, whatever the day
OPEN, CLOSE, DISGUISE = "\ufde0", "\ufde1", "\ufde2"  # around a reply; around the number of what is disguised
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
RESERVED = re.compile("[\ufdd0-\ufdef]")  # Unicode keeps these for the use of programs: no text holds them


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize, and where in it the assistant speaks."""

    parts: Parts
    spans: list[tuple[int, int]]  # in characters; a special token counts as one
    opened: bool = False  # the template decides on BOS: none is to be put before it
    ended: bool = False  # it ends in a token that ends a turn: no EOS is to follow


class ChatTemplate:
    """A template for one tokenizer.

    Attributes:
        source: its Jinja text.
        name: what messages call it.
        plain: it writes no special tokens: its text gets BOS and EOS as any plain text does.
        asked: a setting asks for it. Else it is the model's own, for records of messages and for no others.
        fingerprint: sha256 of all that decides what it writes.
    """

    def __init__(self, source: str, name: str, tokenizer: Tokenizer, plain: bool = False, asked: bool = True):
        self.source, self.name, self.plain, self.asked = source, name, plain, asked
        self._named, self._ids = tokenizer.named, tokenizer.special
        strings = [re.escape(string) for string in sorted(self._ids, key=len, reverse=True)]
        self._special = re.compile("|".join(strings) or "(?!)")
        self._pieces = re.compile(f"({'|'.join([*strings, OPEN, CLOSE])})")
        used = {name: token for name, token in self._named.items() if name in source}
        self.fingerprint = hashlib.sha256(json.dumps([source, plain, used]).encode()).hexdigest()

    def render(self, messages: list[Message]) -> Rendered:
        """The text of a dialogue that ends with the assistant's message."""
        typed: list[str] = []
        messages = [{key: self._disguise(value, typed) for key, value in message.items()} for message in messages]
        text = self._write(messages)
        tells = OPEN in text  # by {% generation %}
        return self._cut(text if tells else self._mark(messages, text), typed, tells)

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled when the first dialogue comes: plain texts do not need a model's template to be sound."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.name} is no Jinja template ({_in_short(error)}); correct it") from None

    def _disguise(self, text: str, typed: list[str]) -> str:
        """A text in which each string of a special token gives way to its number in `typed`."""
        if not text.isascii() and RESERVED.search(text):
            raise ValueError(f"{reprlib.repr(text)} has one of U+FDD0 to U+FDEF, which are no characters; remove it")

        def number(match: re.Match) -> str:
            typed.append(match[0])
            return f"{DISGUISE}{len(typed) - 1}{DISGUISE}"

        return self._special.sub(number, text)

    def _write(self, messages: list[Message], prompt: bool = False) -> str:
        template = self._template
        known = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._named}
        try:
            return template.render(messages=messages, **known)
        except Exception as error:  # a template may fail in any way that a program can
            raise ValueError(f"{self.name} refuses the dialogue: {_in_short(error)}") from None

    def _mark(self, messages: list[Message], text: str) -> str:
        """`text` with marks around every reply, or around what is left of it by a template that strips it."""
        replies = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        for wrap in (_around, _within):
            marked = self._write(
                [message | wrap(message) if n in replies else message for n, message in enumerate(messages)]
            )
            if MARKS.sub("", marked) != text:
                continue
            found = "".join(MARKS.findall(marked))
            if found == (OPEN + CLOSE) * len(replies):
                return marked
            if found.count(CLOSE) == len(replies):  # it drops how a reply begins, such as a thought's tag
                return self._open([messages[:n] for n in replies], text, marked.replace(OPEN, "").split(CLOSE))
        raise ValueError(
            f"{self.name} rewrites replies; mark them in it by {{% generation %}} or take another template"
        )

    def _open(self, prompts: list[list[Message]], text: str, pieces: list[str]) -> str:
        """The pieces, of which all but the last end with a reply, with marks: a reply opens where its prompt ends."""
        at, marked = 0, ""
        for prompt, piece in zip(prompts, pieces, strict=False):
            start = self._write(prompt, prompt=True)
            if not text.startswith(start) or not at <= len(start) <= at + len(piece):
                raise ValueError(
                    f"{self.name} rewrites the dialogue before a reply; mark replies by {{% generation %}}"
                )
            marked += piece[: len(start) - at] + OPEN + piece[len(start) - at :] + CLOSE
            at += len(piece)
        return marked + pieces[-1]

    def _cut(self, marked: str, typed: list[str], tells: bool) -> Rendered:
        """A text with marks, taken apart. The token that ends a turn is the assistant's, too: it has to write it."""
        parts, spans, at, ending = [], [], 0, False
        for piece in self._pieces.split(marked):
            if piece == OPEN:
                spans.append((at, at))
            elif piece == CLOSE:
                spans[-1] = (spans[-1][0], at)
                ending = not tells
            elif piece in self._ids:
                parts.append(self._ids[piece])
                at += 1
                if ending:
                    spans[-1], ending = (spans[-1][0], at), False
            elif piece:
                piece = self._undisguise(piece, typed)
                parts[-1:] = [parts[-1] + piece] if parts and isinstance(parts[-1], str) else [*parts[-1:], piece]
                at += len(piece)
                ending = ending and piece.isspace()
        return self._end(parts, spans, at, ending)

    def _end(self, parts: list[str | int], spans: list[tuple[int, int]], at: int, ending: bool) -> Rendered:
        """Blanks after the last special token are cut off: a reward is read at a token that means the end."""
        closed = spans[-1][1]
        if ending:  # but blanks alone follow the last reply
            spans[-1] = (spans[-1][0], at)
        elif isinstance(parts[-1], str) and parts[-1].isspace() and closed <= at - len(parts[-1]):
            at -= len(parts.pop())
        spans = [(start, min(end, at)) for start, end in spans]
        ended = not isinstance(parts[-1], str) and at > spans[-1][0]
        return Rendered(parts, spans, opened=not self.plain, ended=ended)

    def _undisguise(self, text: str, typed: list[str]) -> str:
        text = re.sub(f"{DISGUISE}([0-9]+){DISGUISE}", lambda match: typed[int(match[1])], text)
        if DISGUISE in text:
            raise ValueError(f"{self.name} cuts a message in the middle; take another template")
        return text


def choose(chat_template: str | None, dialogue_format: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that the settings ask for, else the model's own, if it has one.

    Args:
        chat_template: a Jinja file, or the folder of a model that has a template.
        dialogue_format: a key of DIALOGUE_FORMATS.
    """
    if dialogue_format is not None:
        return ChatTemplate(DIALOGUE_FORMATS[dialogue_format], f"--dialogue_format {dialogue_format}", tokenizer, True)
    if chat_template is None:
        source = _of_folder(tokenizer.folder)
        name = f"the chat template of {tokenizer.folder}"
        return None if source is None else ChatTemplate(source, name, tokenizer, asked=False)
    path, name = Path(chat_template), f"--chat_template {chat_template}"
    source = _of_folder(path) if path.is_dir() else _read(path, name)
    if source is None:
        raise ValueError(f"{name}: the folder has no chat template; give a Jinja file, or take a --dialogue_format")
    return ChatTemplate(source, name, tokenizer)


def _of_folder(folder: Path) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json says, which of several may name one "default"."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja", str(folder))
    file = folder / "tokenizer_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as a JSON object: {error}") from None
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}); give a Jinja file or a model folder that has one"
        ) from None


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _around(message: Message) -> Message:
    return {"content": OPEN + message["content"] + CLOSE}


def _within(message: Message) -> Message:
    content = message["content"]
    start = len(content) - len(content.lstrip())
    end = max(start, len(content.rstrip()))
    return {"content": content[:start] + OPEN + content[start:end] + CLOSE + content[end:]}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: Jinja's own escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the assistant writes this."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller) -> str:
        return OPEN + caller() + CLOSE
