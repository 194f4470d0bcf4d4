"""Samples to examples: written by a template, tokenized in batches, opened, ended, shortened or dropped.

The full texts of a record are tokenized each on its own, and their prefix is what the tokens share: exact, whatever a
tokenizer does where prompt and reply meet. This is the one place where BOS and EOS are put on. Where a chat template
has written its own, none is added: every text ends in one token that means the end, and a reward is read there.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rm.data.chat import ChatTemplate, Rendered
from rm.data.examples import Example, Examples
from rm.data.formats import Sample, Text
from rm.data.tokenizer import Spans, Tokenizer

BATCH = 1024  # records: enough for every core, soon forgotten
Row = tuple[np.ndarray, np.ndarray]  # the (T,) int32 tokens of a text, and (T,) bool: which of them carry loss


@dataclass(frozen=True)
class Item:
    """A record on its way."""

    number: int  # over all files
    where: str  # for messages
    conversation: int  # as `rm.data.conversation.key` has it
    sample: Sample


@dataclass
class Encoder:
    """Makes examples of items, and counts what it leaves out.

    Args:
        imitate: the texts are to be imitated, not compared: it matters which tokens carry loss.
        template: writes dialogues.
        max_length: of a text in tokens.
        cut: "left" or "right" shortens what is longer; None drops it.
    """

    tokenizer: Tokenizer
    imitate: bool
    template: ChatTemplate | None
    max_length: int
    cut: str | None
    kept: array = field(default_factory=lambda: array("q"))  # numbers of records
    dropped: Counter = field(default_factory=Counter)  # reason -> records
    shortened: int = 0

    def encode(self, items: Iterable[Item]) -> Iterator[Example]:
        """Examples of items, in order."""
        written = ((item, texts) for item in items if (texts := self._write(item)))
        while batch := list(itertools.islice(written, BATCH)):
            rows = iter(self._rows([text for _, texts in batch for text in texts]))
            for item, texts in batch:
                example = self._fit(item, list(itertools.islice(rows, len(texts))))
                if example is not None:
                    self.kept.append(item.number)
                    yield example

    def _write(self, item: Item) -> list[Rendered] | None:
        """Its texts, ready to tokenize; None if it is dropped."""
        texts = item.sample.texts
        if self.imitate:
            texts = [_until_last_reply(text) for text in texts]
        if any(isinstance(text, list) and text[-1]["role"] != "assistant" for text in texts):
            return self._drop("that do not end with a reply")
        if self.imitate and not any(_has_words(text, item.sample.loss_from) for text in texts):
            return self._drop("empty text")
        try:
            return [self._rendered(text, item.sample.loss_from) for text in texts]
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None

    def _rendered(self, text: Text, loss_from: int) -> Rendered:
        if isinstance(text, str):
            return Rendered([text], [(loss_from, len(text))])
        if self.template is None:
            folder = self.tokenizer.folder
            raise ValueError(f"has messages, but {folder} no chat template; give --chat_template or --dialogue_format")
        return self.template.render(text)

    def _rows(self, texts: list[Rendered]) -> list[Row]:
        """[BOS] tokens [EOS] of each text, and which carry loss."""
        plain = [text for text in texts if self._is_plain(text)]
        marked = [text for text in texts if not self._is_plain(text)]
        ids = iter(self.tokenizer.encode_batch([text.parts[0] for text in plain]))
        placed = iter(self.tokenizer.encode_parts([text.parts for text in marked]))
        return [self._row(text, *((next(ids), None) if self._is_plain(text) else next(placed))) for text in texts]

    def _is_plain(self, text: Rendered) -> bool:
        """Whether it can do without the places of its tokens, which take time."""
        first = text.parts[0]
        whole = len(text.parts) == 1 and isinstance(first, str)
        return whole and (not self.imitate or text.spans == [(0, len(first))])

    def _row(self, text: Rendered, ids: list[int], places: Spans | None) -> Row:
        """A token carries loss if any of its text does; BOS and EOS if what is beside them does."""
        bos = [] if text.opened or self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        eos = [] if text.ended else [self.tokenizer.eos_id]
        tokens = np.array([*bos, *ids, *eos], np.int32)
        loss = np.ones(len(tokens), bool)
        if places is not None and self.imitate:
            length = sum(len(part) if isinstance(part, str) else 1 for part in text.parts)
            start, end = np.array([*[(0, 1)] * len(bos), *places, *[(length - 1, length)] * len(eos)]).T
            end = np.maximum(end, start + 1)  # of the bytes of a character only the last may have its place
            loss = np.any([(start < b) & (end > a) for a, b in text.spans], axis=0)
        return tokens, loss

    def _fit(self, item: Item, rows: list[Row]) -> Example | None:
        """The example of a record's rows; None if it is dropped."""
        sample = item.sample
        if self._is_void(sample, rows):
            return self._drop("with two equal sides")
        if max(len(tokens) for tokens, _ in rows) > self.max_length:
            if self.cut is None:
                return self._drop(f"longer than --max_length {self.max_length}")
            rows = self._cut_left(rows) if self.cut == "left" else [self._cut_right(*row) for row in rows]
            if not rows or self._is_void(sample, rows):
                return self._drop(f"that --max_length {self.max_length} would cut to nothing to learn from")
            self.shortened += 1
        tokens = [tokens for tokens, _ in rows]
        shared = common_prefix(tokens) if len(rows) > 1 else 0  # a document has nothing to share with
        return Example(
            prefix=tokens[0][:shared],
            replies=tuple(row[shared:] for row in tokens),
            loss=tuple(loss[shared:] for _, loss in rows),
            grade=None if sample.grade is None else np.array(sample.grade, np.float32),
            label=sample.label,
            margin=sample.margin,
            conversation=item.conversation,
        )

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _is_void(self, sample: Sample, rows: list[Row]) -> bool:
        """No token carries loss; or equal texts are graded differently, where no reward can be right."""
        if self.imitate:
            return not any(loss.any() for _, loss in rows)
        known: dict[bytes, float] = {}
        grades = sample.grade or [0.0] * len(rows)
        return any(known.setdefault(row[0].tobytes(), grade) != grade for row, grade in zip(rows, grades, strict=True))

    def _cut_left(self, rows: list[Row]) -> list[Row]:
        """All rows without the same tokens behind BOS, so that a prefix is still shared; none if replies are longer."""
        tokens = [tokens for tokens, _ in rows]
        first = int(tokens[0][0] == self.tokenizer.bos_id)
        last = first + max(map(len, tokens)) - self.max_length
        if last > (common_prefix(tokens) if len(tokens) > 1 else len(tokens[0]) - 1):
            return []
        return [(np.delete(tokens, slice(first, last)), np.delete(loss, slice(first, last))) for tokens, loss in rows]

    def _cut_right(self, tokens: np.ndarray, loss: np.ndarray) -> Row:
        """The beginning of a row, and its end token, which carries no loss: nothing ends there."""
        if len(tokens) <= self.max_length:
            return tokens, loss
        kept = slice(self.max_length - 1)
        return np.append(tokens[kept], tokens[-1]), np.append(loss[kept], False)


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many first tokens all rows share, where each keeps at least its last token for itself."""
    most = min(map(len, rows)) - 1
    differs = np.zeros(most, bool)
    for row in rows[1:]:
        differs |= row[:most] != rows[0][:most]
    return int(differs.argmax()) if differs.any() else most


def _until_last_reply(text: Text) -> Text:
    """A dialogue without what follows its last reply, where nothing is to be learned."""
    if isinstance(text, str):
        return text
    last = max((n for n, message in enumerate(text) if message["role"] == "assistant"), default=len(text) - 1)
    return text[: last + 1]


def _has_words(text: Text, loss_from: int) -> bool:
    if isinstance(text, str):
        return len(text) > loss_from
    return (
        any(message["content"] for message in text if message["role"] == "assistant") or text[-1]["role"] != "assistant"
    )


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens: `rm.data.encode`, for groups of texts in memory."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    cut: str | None  # "left" or "right" shortens what is longer; None is an error

    @property
    def as_messages(self) -> bool:
        """Whether plain texts are taken apart into turns for the template."""
        return self.template is not None and self.template.asked

    def examples(self, groups: Sequence[Sequence[Text]]) -> Examples:
        """One of each group that is not empty, whose common beginning is computed once; none may be dropped."""
        encoder = Encoder(self.tokenizer, False, self.template, self.max_length, self.cut)
        given = {n: list(group) for n, group in enumerate(groups) if len(group)}
        items = (Item(n, f"conversation {n}", n, Sample("", group)) for n, group in given.items())
        examples = Examples.build(encoder.encode(items), encoder.kept)
        if lost := given.keys() - set(encoder.kept):
            reasons = " or ".join(encoder.dropped).replace("--max_length", "max_length")
            raise ValueError(f"conversation {min(lost)} is one {reasons}: shorten it, or give another max_length")
        return examples
