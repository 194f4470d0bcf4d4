"""Chat templates: writes dialogues as text, and finds where in the text the assistant speaks.

A chat template is a Jinja program that comes with a model. It runs in a sandbox, with the helpers that transformers
provides. It leaves two things open, which are found out here:

*Which special tokens are the template's own.* "<|im_end|>" ends a turn where the template writes it, and is ten
ordinary characters where a user typed it. So special-token strings in messages are escaped before the template runs.
Those in its output are then the template's own; they are returned as ids, between strings (`Parts`).

*Which tokens are the assistant's.* Only SFT needs to know. A template may mark them with {% generation %}, but few do.
For the others, `rm.data.reply_marks` finds them.

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

from rm.data import tokenizer_config
from rm.data.messages import REASONING, Message
from rm.data.reply_marks import REPLY_END, REPLY_START, ReplyMarker
from rm.data.sandbox import WIDTH, OutOfTime, Sandbox
from rm.data.template_places import TemplatePlaces
from rm.data.tokenizer import Parts, Tokenizer
from rm.files import read_whole

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

# Unicode noncharacters, which no text may contain (`_escape` checks it), serve as markers in the template's input:
# ESCAPE here, those of replies in `rm.data.reply_marks`.
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
ESCAPE = "\ufde2"  # ESCAPE + index + ESCAPE stands for a special-token string that was in a message

_GIVEN_UP: dict[str, str] = {}  # fingerprint of a template that takes too long -> what was said of it


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize. Positions in it are in characters; a special token counts as one."""

    parts: Parts
    spans: list[tuple[int, int]]  # (start, end) of what the assistant writes; without meaning if it was not looked for
    plain: bool = True  # the text is to be put between BOS and EOS; else it has those that its template writes
    end: int | None = None  # position of the special token that ends the last turn; None: there is no such token
    typed_special: bool = False  # some of its characters are strings of special tokens

    @property
    def length(self) -> int:
        return sum(len(part) if isinstance(part, str) else 1 for part in self.parts)

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
        self._replies = ReplyMarker(self._run, name, self._special_pattern)
        self._places = TemplatePlaces(self._run, source, name)
        used = {name: token for name, token in self._named_tokens.items() if name in source}
        self.fingerprint = hashlib.sha256(json.dumps([source, plain, used]).encode()).hexdigest()

    def render(
        self,
        messages: list[Message],
        find_replies: bool = True,
        tools: list[dict] | None = None,
        variables: dict | None = None,
    ) -> Rendered:
        """Write a dialogue that ends with an assistant message.

        Args:
            find_replies: find out what the assistant writes, for SFT. Some templates rewrite dialogues in such a way
                that it cannot be found.
            tools: descriptions of the tools that the assistant may call.
            variables: more variables for the template, by name.

        Raises:
            ValueError: the template refuses the dialogue, or has no place for something in it.
            RepliesNotFound: replies cannot be found in its text.
        """
        self._places.check(messages, tools, variables or {})
        escaped: list[str] = []
        messages = [self._prepared(message, escaped) for message in messages]
        variables = self._escape((variables or {}) | ({"tools": tools} if tools else {}), escaped)
        self._places.check_messages(messages, variables)
        text = self._run(messages, variables)
        marks_itself = REPLY_START in text  # by {% generation %}
        complete: frozenset[int] = frozenset()
        if find_replies and not marks_itself:
            text, complete = self._replies.mark(messages, variables, text)
        return self._cut(text, escaped, marks_itself, complete)

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
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.add_filter("tojson", _tojson)
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            return environment.from_string(self.source)
        except Exception as error:  # Python's compiler has limits of its own, such as twenty nested loops
            raise ValueError(f"{self.name} is not a valid Jinja template ({_one_line(error)}); correct it") from None

    def _prepared(self, message: Message, escaped: list[str]) -> Message:
        """A message as the template gets it, with thoughts under the names that transformers gives them."""
        message = self._escape(message, escaped)
        if len(message) > 2:
            thought = next((message[key] for key in REASONING if key in message), None)
            if thought is not None:
                message = {"thinking": thought} | message | {"reasoning_content": thought}
            if "tool_calls" in message and not self._places.takes_strings:
                message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        return message

    def _escape(self, value, escaped: list[str]):
        """Replace each special-token string in `value` by its index in `escaped`, to which it is appended.

        Args:
            value: a string, or lists and dictionaries with strings in them.
        """
        if isinstance(value, dict):
            return {self._escape(key, escaped): self._escape(entry, escaped) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._escape(entry, escaped) for entry in value]
        if not isinstance(value, str):
            return value
        if not value.isascii() and NONCHARACTERS.search(value):
            raise ValueError(f"{reprlib.repr(value)} has one of U+FDD0 to U+FDEF, which are no characters; remove it")

        def replacement(match: re.Match) -> str:
            escaped.append(match[0])
            return f"{ESCAPE}{len(escaped) - 1}{ESCAPE}"

        return self._special_pattern.sub(replacement, value)

    def _unescape(self, text: str, escaped: list[str]) -> str:
        text = re.sub(f"{ESCAPE}([0-9]+){ESCAPE}", lambda match: escaped[int(match[1])], text)
        if ESCAPE in text:  # half of an escape is left
            raise ValueError(f"{self.name} cuts a message in the middle; use another template")
        return text

    def _run(self, messages: list[Message], variables: dict | None = None, add_generation_prompt: bool = False) -> str:
        """The template's output for (escaped) messages."""
        if self.fingerprint in _GIVEN_UP:
            raise ValueError(f"{self.name} {_GIVEN_UP[self.fingerprint]}")
        template = self._template
        known = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            variables = {"messages": messages} | known | self._named_tokens | (variables or {})
            text = template.environment.limited(template, variables)
            text.encode()  # fails for half of a surrogate pair
            return text
        except OutOfTime as error:
            _GIVEN_UP[self.fingerprint] = str(error)  # no other dialogue is tried
            raise ValueError(f"{self.name} {error}") from None
        except Exception as error:  # a template may fail in any way that a program can
            raise ValueError(f"{self.name} refuses the dialogue: {_one_line(error)}") from None

    def _cut(self, marked: str, escaped: list[str], marks_itself: bool, complete: frozenset[int]) -> Rendered:
        """Cut a text, which may have markers, into strings and special tokens.

        The token that ends an assistant's turn belongs to the reply: the model has to generate it.

        Args:
            marks_itself: the markers are the template's own, by {% generation %}, which also decide about that token.
            complete: numbers of the replies whose markers include that token already.
        """
        parts: list[list[str] | int] = []
        strings: list[str] | None = None  # of the last part, where it is text
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
                seeks_end = not marks_itself and len(spans) - 1 not in complete
            elif piece in self._special_ids:
                parts.append(self._special_ids[piece])
                strings = None
                end = position if end is None else end
                position += 1
                if seeks_end:
                    spans[-1] = (spans[-1][0], position)
                    seeks_end = False
            elif piece:
                piece = self._unescape(piece, escaped)
                # Markers are dropped here, so strings on both sides of one become one part: a tokenizer must see
                # the text as if it had never been marked.
                if strings is None:
                    strings = []
                    parts.append(strings)
                strings.append(piece)
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
        joined = ["".join(part) if isinstance(part, list) else part for part in parts]
        return Rendered(joined, spans, self.plain, end, bool(escaped))


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
        return read_whole(path).decode()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}); give a Jinja file, or the folder of a model with a chat template"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__  # a MemoryError says nothing


def _with_parsed_arguments(call: dict) -> dict:
    """A call whose arguments are an object, if they were a string of JSON."""
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments"))
    except (TypeError, ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200 or WIDTH.search(form):
        raise jinja2.TemplateError("strftime_now writes a date, not a text")
    return FIXED_DATE.strftime(form)


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
