"""Where in a chat template's text the assistant speaks, for templates that do not mark it by {% generation %}.

Markers are put around every reply before the template runs; apart from the markers, its text must not change. Only SFT
needs to know.
"""

import re
from collections.abc import Callable
from functools import cached_property

from rm.data.messages import REASONING, Message, assistant, user

# Unicode noncharacters, which no text may contain
REPLY_START, REPLY_END = "\ufde0", "\ufde1"
REPLY_MARKERS = re.compile(f"[{REPLY_START}{REPLY_END}]")
# Of a reply that consists of several parts, such as a thought and a call: REPLY_START + its number + PART ... REPLY_END
PART = "\ufde3"
PART_MARKERS = re.compile(f"{REPLY_START}[0-9]+{PART}|{REPLY_END}")
PROBE = "\ufde4"  # a word that no text has, to learn what a template writes


class RepliesNotFound(ValueError):
    """What the assistant writes cannot be told from the rest of a template's output, so that it cannot carry loss."""


class ReplyMarker:
    """Marks the replies in the text that a template writes.

    Args:
        run: writes messages, as `rm.data.chat.ChatTemplate` does.
        name: what error messages call the template.
        special: matches one special token.
    """

    def __init__(self, run: Callable[..., str], name: str, special: re.Pattern):
        self._run, self._name, self._special = run, name, special

    def mark(self, messages: list[Message], variables: dict, text: str) -> tuple[str, frozenset[int]]:
        """Put REPLY_START and REPLY_END around every reply.

        Args:
            messages, variables: what the template was given.
            text: what it wrote.

        Returns:
            `text` with markers, and the numbers of the replies that are marked up to the end of their turn.

        Raises:
            RepliesNotFound: the template rewrites replies.
        """
        if any(len(message) > 2 for message in messages if message["role"] == "assistant"):
            return self._mark_parts(messages, variables, text)
        return self._mark_texts(messages, variables, text), frozenset()

    @cached_property
    def _openings(self) -> list[str]:
        """What the template writes before a reply: its generation prompt, and what a plain reply has before it."""
        try:
            prompt, opened = (self._run([user("a")], add_generation_prompt=opens) for opens in (False, True))
            answered = self._run([user("a"), assistant(PROBE)]).split(PROBE)[0]
        except ValueError:
            return []
        openings = [text[len(prompt) :] for text in (opened, answered) if text.startswith(prompt)]
        return [opening for opening in openings if opening.strip()]

    @cached_property
    def _turn_end(self) -> str:
        """The special token that ends a reply of nothing but text; "" if none does."""
        text = self._run([user("a"), assistant(PROBE)])
        ending = self._special.search(text.split(PROBE)[-1])
        return "" if ending is None else ending[0]

    def _mark_texts(self, messages: list[Message], variables: dict, text: str) -> str:
        """`text` with markers around every reply, where replies are nothing but text."""
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # Markers around the whole reply first. A template that strips white space from replies does not strip it
        # behind a marker, which changes the text; then markers inside the white space are tried.
        for add_markers in (_mark_whole, _mark_stripped):
            with_markers = list(messages)
            for i in replies:
                with_markers[i] = messages[i] | {"content": add_markers(messages[i]["content"])}
            marked = self._run(with_markers, variables)
            if REPLY_MARKERS.sub("", marked) != text:
                continue
            markers = "".join(REPLY_MARKERS.findall(marked))
            if markers == (REPLY_START + REPLY_END) * len(replies):
                return marked
            # Some templates drop the beginning of a reply, such as a tag that opens a thought, and the start marker
            # with it. The end markers still show where replies end.
            if markers.count(REPLY_END) == len(replies):
                return self._mark_starts(marked.replace(REPLY_START, "").split(REPLY_END))
        raise RepliesNotFound(
            f"{self._name} rewrites replies; mark them in it by {{% generation %}}, or take another template"
        )

    def _mark_starts(self, pieces: list[str]) -> str:
        """A text with markers around every reply, which starts behind the last opening before its end.

        Args:
            pieces: the text, split behind each reply: every piece but the last ends with one.
        """
        marked = []
        for piece in pieces[:-1]:
            start = self._behind_opening(piece, 0, len(piece))
            if start is None:
                raise RepliesNotFound(
                    f"{self._name} rewrites the dialogue before a reply; mark replies in it by {{% generation %}}"
                )
            marked += [piece[:start], REPLY_START, piece[start:], REPLY_END]
        return "".join([*marked, pieces[-1]])

    def _behind_opening(self, text: str, start: int, end: int) -> int | None:
        """Where the last opening of a reply in `text[start:end]` ends; None if there is none."""
        for opening in self._openings:
            at = text.rfind(opening, start, end)
            if at >= 0:
                return at + len(opening)
        return None

    def _mark_parts(self, messages: list[Message], variables: dict, text: str) -> tuple[str, frozenset[int]]:
        """As `mark`, for replies with thoughts and calls. All that the template writes of a reply carries loss."""
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for add_markers in (_mark_whole, _mark_stripped):
            with_markers = list(messages)
            for n, i in enumerate(replies):
                with_markers[i] = _with_marked_parts(messages[i], n, add_markers)
            marked = self._run(with_markers, variables)
            if PART_MARKERS.sub("", marked) == text:
                break
        else:
            raise RepliesNotFound(
                f"{self._name} rewrites replies with thoughts or calls; mark them in it by {{% generation %}}"
            )
        starts, ends = _positions(marked)
        spans, complete, before = [], set(), 0
        for n, i in enumerate(replies):
            if n not in starts:
                raise RepliesNotFound(f"{self._name} leaves out what reply {n + 1} says")
            start, end = starts[n], ends[n]
            has_call = "tool_calls" in messages[i] or "function_call" in messages[i]
            opened = self._behind_opening(text, before, start)
            if opened is None and has_call:
                raise RepliesNotFound(
                    f"{self._name} does not tell where a call begins; mark replies in it by {{% generation %}}"
                )
            if has_call:  # behind the name of the function follow arguments, and what closes the call
                end = self._end_of_call(messages[: i + 1], variables, text, end)
                complete.add(n)
            start = start if opened is None else opened
            if start < before:  # the template writes a call, its result and the next reply as one turn
                raise RepliesNotFound(
                    f"{self._name} writes reply {n} and reply {n + 1} as one; mark replies in it by {{% generation %}}"
                )
            spans.append((start, end))
            before = end
        return _insert_markers(text, spans), frozenset(complete)

    def _end_of_call(self, messages: list[Message], variables: dict, text: str, start: int) -> int:
        """Where the turn ends that calls a tool, the special token that ends it included.

        Args:
            messages: up to this turn.
            text: of the whole dialogue.
            start: behind the name of the last function.
        """
        specials = re.compile(rf"\s*((?:{self._special.pattern})+)")
        run = specials.search(text, start)
        if run is not None and self._turn_end and self._turn_end in run[1]:
            return run.start(1) + run[1].index(self._turn_end) + len(self._turn_end)
        # Special tokens may be part of the arguments, or none ends a turn: then the text up to here tells.
        up_to_here = self._run(messages, variables).rstrip()
        if not text.startswith(up_to_here) or len(up_to_here) < start:
            raise RepliesNotFound(f"{self._name} does not tell where a call ends; mark replies by {{% generation %}}")
        end = len(up_to_here)
        run = specials.match(text, end)
        return end if run is None else run.start(1) + self._special.match(run[1]).end()


def _mark_whole(content: str, start_marker: str = REPLY_START) -> str:
    return start_marker + content + REPLY_END


def _mark_stripped(content: str, start_marker: str = REPLY_START) -> str:
    """Markers inside the white space at both ends."""
    start = len(content) - len(content.lstrip())
    end = max(start, len(content.rstrip()))  # `start` where there is nothing but white space
    return content[:start] + start_marker + content[start:end] + REPLY_END + content[end:]


def _with_marked_parts(message: Message, n: int, add_markers: Callable[[str, str], str]) -> Message:
    """Reply `n` with markers around its text, its thoughts, and the names of the functions that it calls."""
    marker, message = f"{REPLY_START}{n}{PART}", dict(message)
    for key in ("content", *REASONING):
        if message.get(key):  # nothing is as good as absent for some templates
            message[key] = add_markers(message[key], marker)
    if not message["content"] and len(message) == 2:
        message["content"] = add_markers("", marker)
    if "function_call" in message:
        message["function_call"] = _with_marked_name(message["function_call"], marker)
    if "tool_calls" in message:
        message["tool_calls"] = [
            call | {"function": _with_marked_name(call["function"], marker)} for call in message["tool_calls"]
        ]
    return message


def _with_marked_name(function: dict, marker: str) -> dict:
    return function | {"name": _mark_whole(function["name"], marker)}


def _positions(marked: str) -> tuple[dict[int, int], dict[int, int]]:
    """(where the first part of each reply starts, where its last part ends), in the text without markers."""
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    removed, current = 0, 0
    for marker in PART_MARKERS.finditer(marked):
        position = marker.start() - removed
        if marker[0] == REPLY_END:
            ends[current] = position
        else:
            current = int(marker[0][1:-1])
            starts.setdefault(current, position)
        removed += len(marker[0])
    return starts, ends


def _insert_markers(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, position = [], 0
    for start, end in spans:
        pieces += [text[position:start], REPLY_START, text[start:end], REPLY_END]
        position = end
    return "".join([*pieces, text[position:]])
