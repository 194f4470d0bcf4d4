"""Shows an example as the model reads it: on a terminal, or in the log of a run.

It is decoded from its tokens, so that it is what the model gets, not what a record says:

    «...»       around the tokens that carry loss (SFT), or around the token at which a reward is read; with other
                signs, named above it, where the text itself has these
    ↵ ⇥         a line break, a tab
    <|im_end|>  a special token
    <U+001B>    a character that a terminal would obey or not show; also one that would be taken for something else
                here: ↵, ⇥, and the first of a special token's string that is ordinary text

So nothing that others have typed reaches a terminal as it is.
"""

import bisect
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from rm.data.examples import Example, Examples
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.terminal import CONTROL

MARKS = ("«»", "⟦⟧", "▐▌")  # the first whose signs are not in the text
VISIBLE = {"\n": "↵", "\t": "⇥"}
ESCAPED = re.compile(f"[{CONTROL}{''.join(VISIBLE.values())}]")
PLAIN, SPECIAL, MARKED, FAINT, BOLD = "", "36", "32", "2", "1"  # SGR codes of ANSI terminals
MOST_PARTS = 16  # of a text that alternates between tokens with and without loss
MOST_COLUMNS = 120


@dataclass(frozen=True)
class Size:
    """How much of an example is shown.

    Attributes:
        columns: for each of its texts; where it has more, its middle is left out.
        replies: of a ranking.
        breaks: begin a new line after each line break.
    """

    columns: int
    replies: int
    breaks: bool


FULL, BRIEF = Size(1600, 8, True), Size(600, 2, False)


@dataclass(frozen=True)
class ShownText:
    """What the replies of a preference share, one of the replies, or a whole text for SFT."""

    name: str  # "shared", "chosen", "rejected", "grade 4"; "" of a text for SFT
    parts: list[tuple[np.ndarray, bool]]  # (tokens, whether they are marked)
    grade: float | None = None  # of a reply

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.parts)


def texts_of(example: Example) -> list[ShownText]:
    """The texts of an example: one for SFT or regression; otherwise what the replies share, if any tokens, and they."""
    if len(example.attributes):
        (ids,) = example.replies
        return [ShownText("", [(ids[:-1], False), (ids[-1:], True)])]
    if len(example.replies) == 1:
        loss = example.loss[0].copy()
        loss[0] = False  # nothing predicts the first token
        bounds = [0, *(np.flatnonzero(np.diff(loss)) + 1), len(loss)]
        ids = example.replies[0]
        return [ShownText("", [(ids[a:b], bool(loss[a])) for a, b in zip(bounds, bounds[1:], strict=False)])]
    shared = [ShownText("shared", [(example.prefix, False)])] if len(example.prefix) else []
    return shared + [
        ShownText(name, [(ids[:-1], False), (ids[-1:], True)], float(grade))
        for name, ids, grade in zip(_names(example), example.replies, example.grade, strict=True)
    ]


def _names(example: Example) -> list[str]:
    """What the replies are called: by which of them is better, or, where that does not say all, by their grades."""
    grades = [float(grade) for grade in example.grade]
    if len(grades) == 2 and example.label == 0.5:
        return ["tied", "tied"]
    if sorted(grades) == [0.0, 1.0]:
        first_is_better = (grades[0] > grades[1]) == (example.label > 0.5)
        return ["chosen", "rejected"] if first_is_better else ["rejected", "chosen"]
    return [f"grade {grade:g}" for grade in grades]


def say_example(examples: Examples, tokenizer: Tokenizer) -> None:
    """Print the first example of a training, in about 12 lines, before its first step."""
    if dist.is_main():
        title = f"example (record {examples.record[0] + 1} of the data)"
        # As it is: its colours are codes of the terminal.
        tqdm.write("\n".join(Screen(sys.stdout).example(examples[0], tokenizer, title, BRIEF)))


class Screen:
    """How lines are written for a stream: its width, whether it has colours, and which characters."""

    def __init__(self, stream):
        self.width = max(40, min(shutil.get_terminal_size().columns, MOST_COLUMNS))
        self.has_colors = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._encoding = stream.encoding or "utf-8"

    def example(self, example: Example, tokenizer: Tokenizer, title: str, size: Size) -> list[str]:
        """The lines that show an example."""
        texts, marks = texts_of(example), _marks(example, tokenizer)
        if len(example.attributes):
            numbers = ", ".join("unknown" if np.isnan(number) else f"{number:g}" for number in example.attributes)
            facts = f"{texts[0].tokens:,} tokens, attributes {numbers}; they are read at {marks[0]}...{marks[1]}"
        elif len(example.replies) == 1:
            loss = sum(len(ids) for text in texts for ids, marked in text.parts if marked)
            facts = f"{texts[0].tokens:,} tokens; {marks[0]}...{marks[1]} carries loss ({loss:,} tokens)"
        else:
            total = sum(text.tokens for text in texts)
            label = "" if example.label in (0.0, 0.5, 1.0) else f", label {example.label:g}"
            label += f", margin {example.margin:g}" if example.margin else ""
            label += f", weight {example.weight:g}" if example.weight != 1 else ""
            label += f", strength {example.strength:g}" if example.strength != 1 else ""
            facts = f"{total:,} tokens{label}; the reward is read at {marks[0]}...{marks[1]}"
        lines = self.wrapped(f"{title}: {facts}", BOLD)
        shown = texts[: size.replies + (texts[0].grade is None)]
        for text in shown:
            if text.name:
                by = f" by {len(example.replies)} replies" if text.grade is None else ""
                lines.append(self.styled(f"  {text.name}{by}, {text.tokens:,} tokens", FAINT))
            # A preference has several texts, which share the place of a brief example.
            columns = size.columns if len(texts) == 1 or size.breaks else size.columns // (len(shown) + 1)
            for line in _broken(_characters(text, tokenizer, marks, columns, size.breaks), self.width - 4, size.breaks):
                lines.append("    " + self._joined(line))
        if len(shown) < len(texts):
            lines.append(self.styled(f"  and {len(texts) - len(shown):,} more replies", FAINT))
        return lines

    def wrapped(self, text: str, style: str = PLAIN, indent: str = "") -> list[str]:
        """A line of words, escaped, on as many lines as it needs.

        Args:
            indent: before all lines but the first.
        """
        first, *more = _broken([(c, style) for c in escaped(text)], self.width, False)
        rest = [character for line in more for character in line]
        broken = [first, *(_broken(rest, self.width - len(indent), False) if rest else [])]
        return [indent * (n > 0) + self._joined(line).rstrip() for n, line in enumerate(broken)]

    def styled(self, text: str, style: str) -> str:
        return self._joined([(character, style) for character in text])

    def _joined(self, line: Sequence[tuple[str, str]]) -> str:
        """A line of (character, style)."""
        text, current = "", PLAIN
        for character, style in line:
            if style != current and self.has_colors:
                text += f"\x1b[0m\x1b[{style}m" if style else "\x1b[0m"
                current = style
            text += character
        text += "\x1b[0m" if current else ""
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)  # what its encoding cannot write


def escaped(text: str) -> str:
    """A text in which every character is one that a terminal shows."""
    return ESCAPED.sub(lambda match: VISIBLE.get(match[0]) or _code(match[0]), text)


def _code(character: str) -> str:
    return f"<U+{ord(character):04X}>"


def decoded(ids: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of some tokens, as it is shown: (string, whether it is a special token)."""
    found = []
    for text, is_special in tokenizer.decode(ids.tolist()):
        if not is_special:  # nothing in it is to look like a special token
            text = tokenizer.special_pattern.sub(lambda match: _code(match[0][0]) + match[0][1:], text)
        found.append((escaped(text), is_special))
    return found


def _marks(example: Example, tokenizer: Tokenizer) -> str:
    """Two signs that an example does not have."""
    used = {
        sign
        for ids in (example.prefix, *example.replies)
        for text, _ in tokenizer.decode(ids.tolist())
        for sign in text
    }
    return next((marks for marks in MARKS if not used & set(marks)), MARKS[-1])


def _characters(text: ShownText, tokenizer: Tokenizer, marks: str, columns: int, breaks: bool) -> list[tuple[str, str]]:
    """The (character, style) that show a text in about as many columns; the middle of a long one is left out."""
    parts, left_out = text.parts, 0
    if len(parts) > MOST_PARTS:
        half = MOST_PARTS // 2
        left_out = sum(len(ids) for ids, _ in parts[half:-half])
        parts = [*parts[:half], *parts[-half:]]
    width = partial(_width, tokenizer=tokenizer, breaks=breaks)
    # What the shorter parts leave, the longer ones get.
    needed, share, left = [width(ids[: 2 * columns]) for ids, _ in parts], {}, columns
    for done, i in enumerate(np.argsort(needed)):
        share[i] = min(needed[i], left // (len(parts) - done))
        left -= share[i]
    found: list[tuple[str, str]] = []
    for i, (ids, is_marked) in enumerate(parts):
        if left_out and i == MOST_PARTS // 2:
            found += _gap(left_out)
        style = MARKED if is_marked else PLAIN
        found += [(marks[0], MARKED)] * is_marked
        if width(ids[: 2 * columns]) <= share[i]:
            found += _styled(ids, tokenizer, style)
        else:
            numbers = range(1, min(len(ids), 2 * columns) // 2)
            start = bisect.bisect_right(numbers, share[i] // 2, key=lambda n: width(ids[:n]))
            end = bisect.bisect_right(numbers, share[i] // 2, key=lambda n: width(ids[-n:]))
            found += _styled(ids[:start], tokenizer, style)
            found += _gap(len(ids) - start - end)
            found += _styled(ids[len(ids) - end :], tokenizer, style)
        found += [(marks[1], MARKED)] * is_marked
    return found


def _styled(ids: np.ndarray, tokenizer: Tokenizer, style: str) -> list[tuple[str, str]]:
    pieces = decoded(ids, tokenizer)
    return [(c, (style or SPECIAL) if is_special else style) for string, is_special in pieces for c in string]


def _gap(tokens: int) -> list[tuple[str, str]]:
    return [(character, FAINT) for character in f" [... {tokens:,} tokens ...] "]


def _width(ids: np.ndarray, tokenizer: Tokenizer, breaks: bool) -> int:
    """The columns that some tokens take. A line that is broken takes half of a line more."""
    text = "".join(string for string, _ in decoded(ids, tokenizer))
    return sum(map(_columns, text)) + (40 * text.count(VISIBLE["\n"]) if breaks else 0)


def _columns(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _broken(characters: list[tuple[str, str]], width: int, breaks: bool) -> list[list[tuple[str, str]]]:
    """Lines of at most `width` columns, broken behind blanks where that is possible.

    Args:
        breaks: also break behind each sign of a line break, and what marks its end.
    """
    lines, line, used, ends = [], [], 0, False
    for character, style in characters:
        if ends and not any(character == marks[1] for marks in MARKS):
            lines.append(line)
            line, used, ends = [], 0, False
        elif used + _columns(character) > width:
            blanks = (i + 1 for i in range(len(line) - 1, len(line) // 2, -1) if line[i][0] == " ")
            at = next(blanks, len(line))
            lines.append(line[:at])
            line = line[at:]
            used = sum(_columns(c) for c, _ in line)
        line.append((character, style))
        used += _columns(character)
        ends = ends or (breaks and character == VISIBLE["\n"])
    return [*lines, line] if line or not lines else lines
