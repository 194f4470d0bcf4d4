"""Chat templates: writes dialogues as text, and finds where in the text the assistant speaks.

A chat template is a Jinja program that comes with a model. It runs in a sandbox, with the helpers that transformers
provides. It leaves two things open, which are found out here:

*Which special tokens are the template's own.* "<|im_end|>" ends a turn where the template writes it, and is ten
ordinary characters where a user typed it. So special-token strings in messages are escaped before the template runs.
Those in its output are then the template's own; they are returned as ids, between strings (`Parts`).

*Which tokens are the assistant's.* Only SFT needs to know. A template may mark them with {% generation %}, but few do.
For the others, markers are put around every reply before the template runs; apart from the markers, the text must not
change.

The ids are those of transformers' `apply_chat_template`: nothing is cut off and nothing is appended. So a reward is
read where other software reads it.
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

from rm.data import tokenizer_config
from rm.data.formats import Message
from rm.data.tokenizer import Parts, Tokenizer

# A template's source is part of its fingerprint, which caches and scoring contracts store: do not reword these.
_TURNS = (
    "{%% for m in messages %%}{%% if m.role not in ['user', 'assistant'] %%}"
    "{{ raise_exception('it has no place for a message of ' ~ m.role) }}{%% endif %%}"
    "{{ ('%s' if m.role == 'user' else '%s') + m.content }}{%% endfor %%}"
)
DIALOGUE_FORMATS = {
    "hh": _TURNS % ("###Human: ", "###Assistant: "),
    "anthropic": _TURNS % (r"\n\nHuman: ", r"\n\nAssistant: "),
}
BARE_TEXT = ("auto", "dialogue", "plain")  # see `bare_as_dialogue`
FIXED_DATE = datetime.datetime(2024, 7, 26)  # for templates that write today's date: texts must not depend on it
FORMATTED_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Unicode noncharacters, which no text may contain (`_escape` checks it), serve as markers in the template's input.
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
REPLY_START, REPLY_END = "\ufde0", "\ufde1"
ESCAPE = "\ufde2"  # ESCAPE + index + ESCAPE stands for a special-token string that was in a message
REPLY_MARKERS = re.compile(f"[{REPLY_START}{REPLY_END}]")


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize. Positions in it are in characters; a special token counts as one."""

    parts: Parts
    spans: list[tuple[int, int]]  # (start, end) of what the assistant writes; without meaning if it was not looked for
    plain: bool = True  # the text is to be put between BOS and EOS; else it has those that its template writes
    end: int | None = None  # position of the special token that ends the last turn; None: there is no such token

    @property
    def end_id(self) -> int | None:
        """The special token that ends the last turn."""
        position = 0
        for part in self.parts:
            if position == self.end:
                return part
            position += len(part) if isinstance(part, str) else 1
        return None


class ChatTemplate:
    """A chat template, for one tokenizer.

    Attributes:
        source: its Jinja text.
        name: what error messages call it.
        plain: it writes no special tokens, so its text gets BOS and EOS as any plain text does.
        explicit: set by a flag. Otherwise it is the model's own default, used only for records that are messages.
        fingerprint: sha256 of everything that determines its output.
    """

    def __init__(self, source: str, name: str, tokenizer: Tokenizer, plain: bool = False, explicit: bool = True):
        self.source, self.name, self.plain, self.explicit = source, name, plain, explicit
        self._named_tokens, self._special_ids = tokenizer.named, tokenizer.special
        # The longest first: an alternation takes the first alternative that matches.
        strings = [re.escape(string) for string in sorted(self._special_ids, key=len, reverse=True)]
        self._special_pattern = re.compile("|".join(strings) or "(?!)")  # "(?!)" matches nothing
        self._split_pattern = re.compile(f"({'|'.join([*strings, REPLY_START, REPLY_END])})")
        used = {name: token for name, token in self._named_tokens.items() if name in source}
        self.fingerprint = hashlib.sha256(json.dumps([source, plain, used]).encode()).hexdigest()

    def render(self, messages: list[Message], find_replies: bool = True) -> Rendered:
        """Write a dialogue that ends with an assistant message.

        Args:
            find_replies: find out what the assistant writes, for SFT. Some templates rewrite dialogues in such a way
                that it cannot be found.

        Raises:
            ValueError: the template refuses the dialogue, or replies cannot be found in its text.
        """
        escaped: list[str] = []
        messages = [{key: self._escape(value, escaped) for key, value in message.items()} for message in messages]
        text = self._run(messages)
        marks_itself = REPLY_START in text  # by {% generation %}
        if find_replies and not marks_itself:
            text = self._mark(messages, text)
        return self._cut(text, escaped, marks_itself)

    def for_other_software(self, tokenizer: Tokenizer) -> str:
        """Jinja text with which `apply_chat_template` of transformers gives the same ids as `rm.data.encode` here.

        A plain format gets the BOS and EOS that it is put between, and today's date is a fixed one.
        """
        source = FORMATTED_DATE.sub(lambda call: json.dumps(FIXED_DATE.strftime(call[2])), self.source)
        if not self.plain:
            return source
        if tokenizer.bos_id is not None:
            # Some tokenizers put a blank before a text, but not behind a special token.
            (plain,) = tokenizer.encode_batch(["#"])
            ((behind_bos, _),) = tokenizer.encode_parts([[tokenizer.bos_id, "#"]])
            source = "{{ bos_token }}" + ("" if behind_bos[1:] == plain else "{{ ' ' }}") + source
        return source + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled at the first dialogue: for plain texts only, a model's template may be broken."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": FIXED_DATE.strftime}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.name} is not a valid Jinja template ({_one_line(error)}); correct it") from None

    def _escape(self, text: str, escaped: list[str]) -> str:
        """Replace each special-token string in `text` by its index in `escaped`, to which it is appended."""
        if not text.isascii() and NONCHARACTERS.search(text):
            raise ValueError(f"{reprlib.repr(text)} has one of U+FDD0 to U+FDEF, which are no characters; remove it")

        def replacement(match: re.Match) -> str:
            escaped.append(match[0])
            return f"{ESCAPE}{len(escaped) - 1}{ESCAPE}"

        return self._special_pattern.sub(replacement, text)

    def _unescape(self, text: str, escaped: list[str]) -> str:
        text = re.sub(f"{ESCAPE}([0-9]+){ESCAPE}", lambda match: escaped[int(match[1])], text)
        if ESCAPE in text:  # half of an escape is left
            raise ValueError(f"{self.name} cuts a message in the middle; use another template")
        return text

    def _run(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's output for (escaped) messages."""
        template = self._template
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        variables |= self._named_tokens
        try:
            return template.render(messages=messages, **variables)
        except Exception as error:  # a template may fail in any way that a program can
            raise ValueError(f"{self.name} refuses the dialogue: {_one_line(error)}") from None

    def _mark(self, messages: list[Message], text: str) -> str:
        """`text` with REPLY_START and REPLY_END around every reply, as the template writes it.

        Args:
            messages: whose output, without markers, is `text`.
        """
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # Markers around the whole reply first. A template that strips white space from replies does not strip it
        # behind a marker, which changes the text; then markers inside the white space are tried.
        for add_markers in (_mark_whole, _mark_stripped):
            with_markers = list(messages)
            for i in replies:
                with_markers[i] = messages[i] | {"content": add_markers(messages[i]["content"])}
            marked = self._run(with_markers)
            if REPLY_MARKERS.sub("", marked) != text:
                continue
            markers = "".join(REPLY_MARKERS.findall(marked))
            if markers == (REPLY_START + REPLY_END) * len(replies):
                return marked
            # Some templates drop the beginning of a reply, such as a tag that opens a thought, and the start marker
            # with it. The end markers still show where replies end.
            if markers.count(REPLY_END) == len(replies):
                prompts = [messages[:i] for i in replies]
                return self._mark_starts(prompts, text, marked.replace(REPLY_START, "").split(REPLY_END))
        raise ValueError(
            f"{self.name} rewrites replies; mark them in it by {{% generation %}}, or take another template"
        )

    def _mark_starts(self, prompts: list[list[Message]], text: str, pieces: list[str]) -> str:
        """`text` with markers around every reply: a reply starts where the template's text of its prompt ends.

        Args:
            prompts: for each reply the messages before it.
            pieces: `text`, split behind each reply: every piece but the last ends with one.
        """
        marked, offset = "", 0  # `offset`: characters of `text` that are in `marked`
        for prompt, piece in zip(prompts, pieces[:-1], strict=True):
            prompt_text = self._run(prompt, add_generation_prompt=True)
            start = len(prompt_text) - offset  # of the reply, in `piece`
            if not text.startswith(prompt_text) or not 0 <= start <= len(piece):
                raise ValueError(
                    f"{self.name} rewrites the dialogue before a reply; mark replies in it by {{% generation %}}"
                )
            marked += piece[:start] + REPLY_START + piece[start:] + REPLY_END
            offset += len(piece)
        return marked + pieces[-1]

    def _cut(self, marked: str, escaped: list[str], marks_itself: bool) -> Rendered:
        """Cut a text, which may have markers, into strings and special tokens.

        The token that ends an assistant's turn belongs to the reply: the model has to generate it.

        Args:
            marks_itself: the markers are the template's own, by {% generation %}, which also decide about that token.
        """
        parts: list[str | int] = []
        spans: list[tuple[int, int]] = []
        position = 0  # in characters, a special token counting as one, as in `Rendered`
        seeks_end = False  # behind a reply, before the special token that ends its turn
        end = None  # of the special tokens behind the last text, with white space at most between them, the first
        for piece in self._split_pattern.split(marked):
            if piece == REPLY_START:
                spans.append((position, position))
                end = None  # a special token before an empty reply does not end it
            elif piece == REPLY_END:
                spans[-1] = (spans[-1][0], position)
                seeks_end = not marks_itself
            elif piece in self._special_ids:
                parts.append(self._special_ids[piece])
                end = position if end is None else end
                position += 1
                if seeks_end:
                    spans[-1] = (spans[-1][0], position)
                    seeks_end = False
            elif piece:
                piece = self._unescape(piece, escaped)
                # Markers are dropped here, so strings on both sides of one become one part: a tokenizer must see
                # the text as if it had never been marked.
                if parts and isinstance(parts[-1], str):
                    parts[-1] += piece
                else:
                    parts.append(piece)
                position += len(piece)
                # Only white space may stand between a reply and the token that ends it (Llama 2: "reply </s>").
                # After other text, a special token belongs to the next turn.
                if not piece.isspace():
                    seeks_end, end = False, None
        if spans and end is None and not marks_itself:
            # No special token ends the last turn: all text behind the reply does, such as "\n###\n", and EOS.
            spans[-1] = (spans[-1][0], position)
        if not parts:
            raise ValueError(f"{self.name} writes nothing for the dialogue; use another template")
        return Rendered(parts, spans, self.plain, end)


def choose_template(
    chat_template: str | None, dialogue_format: str | None, tokenizer: Tokenizer
) -> ChatTemplate | None:
    """The template that the settings name, otherwise the model's own, or None if it has none.

    Args:
        chat_template: a Jinja file, or the folder of a model that has a template.
        dialogue_format: a key of DIALOGUE_FORMATS.
    """
    if dialogue_format is not None:
        source, name = DIALOGUE_FORMATS[dialogue_format], f"--dialogue_format {dialogue_format}"
        return ChatTemplate(source, name, tokenizer, plain=True)
    if chat_template is None:
        source = _template_of(tokenizer.folder)
        if source is None:
            return None
        return ChatTemplate(source, f"the chat template of {tokenizer.folder}", tokenizer, explicit=False)
    path, name = Path(chat_template), f"--chat_template {chat_template}"
    source = _template_of(path) if path.is_dir() else _read(path, name)
    if source is None:
        raise ValueError(f"{name}: the folder has no chat template; give a Jinja file, or use --dialogue_format")
    return ChatTemplate(source, name, tokenizer)


def bare_as_dialogue(bare_text: str, template: ChatTemplate | None) -> bool:
    """Whether a prompt and a reply that are bare strings become a dialogue; else they are joined as they stand.

    Args:
        bare_text: of BARE_TEXT; "auto" makes them a dialogue if there is a template.
    """
    if bare_text == "dialogue" and template is None:
        raise ValueError(
            "--bare_text dialogue: the model has no chat template; give --chat_template or --dialogue_format"
        )
    return template is not None and bare_text != "plain"


def _template_of(folder: Path) -> str | None:
    """A model's template: chat_template.jinja, or in tokenizer_config.json, where one of several is named "default"."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja", str(folder))
    template = tokenizer_config.read(folder).get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}); give a Jinja file, or the folder of a model with a chat template"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _mark_whole(content: str) -> str:
    return REPLY_START + content + REPLY_END


def _mark_stripped(content: str) -> str:
    """Markers inside the white space at both ends."""
    start = len(content) - len(content.lstrip())
    end = max(start, len(content.rstrip()))  # `start` where there is nothing but white space
    return content[:start] + REPLY_START + content[start:end] + REPLY_END + content[end:]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As in transformers; Jinja's own filter escapes HTML characters."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: the template marks what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_with_markers"), [], [], body).set_lineno(line)

    def _with_markers(self, caller) -> str:
        return REPLY_START + caller() + REPLY_END
