"""Converts samples to examples: applies the chat template, tokenizes, adds BOS and EOS, truncates or drops.

The full texts of a record are tokenized separately, and the record's prefix is what their tokens have in common. So the
prefix is exact, whatever a tokenizer does where prompt and response meet.

BOS and EOS are put around a plain text here and nowhere else. A dialogue has what its chat template writes, to the last
token, where its reward is read. Only for SFT is EOS appended to a dialogue, if its template ends no turn.
"""

import enum
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rm.data.chat import ChatTemplate, Rendered
from rm.data.examples import Example, common_prefix
from rm.data.messages import WRITTEN, Text
from rm.data.reply_marks import RepliesNotFound
from rm.data.sample import Sample
from rm.data.tokenizer import Spans, Tokenizer

Span = tuple[int, int]

# Tokenized at a time: enough to occupy every core, little enough to hold in memory
BATCH_RECORDS, BATCH_CHARACTERS = 1024, 32_000_000
FAR_OVER = 32  # characters for each token of --max_length, above which a text's beginning tells that it is too long
# What chat templates write. A plain text that has them was probably written by one.
TEMPLATE_STRINGS = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<｜User｜>", "[INST]",
)  # fmt: skip


class Task(enum.Enum):
    """What the examples are for, which decides what a record must have."""

    SFT = "sft"  # demonstrations: texts whose tokens, or some of them, carry loss
    PREFERENCE = "preference"  # responses with grades
    SCORING = "scoring"  # responses that need no grades
    SCORED_DEMONSTRATIONS = "scored demonstrations"  # texts of demonstrations, to be scored
    REGRESSION = "regression"  # the same texts, with numbers that are learned

    @property
    def reads_demonstrations(self) -> bool:
        return self in (Task.SFT, Task.SCORED_DEMONSTRATIONS, Task.REGRESSION)


@dataclass(frozen=True)
class PendingRecord:
    """A record that has been read and is to be encoded."""

    index: int  # counted over all files
    location: str  # file and line, for messages
    conversation: int  # `rm.data.conversation.key_of`
    sample: Sample
    texts: list[Text]  # of the sample, as they are to be written
    loss_from: int = 0  # of a plain text for SFT: number of leading characters that carry no loss
    file: int = 0  # index of its file
    prompt: int | None = None  # `rm.data.conversation.prompt_key_of`


class TokenizedText(NamedTuple):
    """One full text of a record.

    Shapes: T tokens.
    """

    tokens: np.ndarray  # (T,) int32
    loss: np.ndarray  # (T,) bool: which tokens carry SFT loss
    n_last: int  # how many tokens there are from the one that ends the last turn on; 0: no token ends it


@dataclass
class Encoder:
    """Converts records to examples, and counts what it drops.

    Args:
        task: decides whether it matters which tokens carry loss (SFT) or whether equal texts are graded differently.
        template: writes dialogues.
        max_length: of a text, in tokens.
        cut: "left" or "right" truncates longer texts on that side; None drops their records.
        padding_id: of a reward model that other software trained. transformers reads a reward at the last token that is
            not this one, so tokens behind that one are left out. None: a reward is read at the last token.
        parse_special_tokens: whether strings of special tokens in plain texts are these tokens; else characters.
        train_on: for SFT, "all" replies of a dialogue or only the "last" one.
    """

    tokenizer: Tokenizer
    task: Task
    template: ChatTemplate | None
    max_length: int
    cut: str | None
    padding_id: int | None = None
    parse_special_tokens: bool = False
    train_on: str = "all"
    kept: array = field(default_factory=lambda: array("q"))  # indices of the records that became examples
    dropped: dict[str, array] = field(default_factory=dict)  # reason -> indices of the records
    first_dropped: dict[str, PendingRecord] = field(default_factory=dict)  # reason -> the first of them
    lengths: array = field(default_factory=lambda: array("q"))  # tokens of each record's longest text, before it is cut
    estimated: int = 0  # records whose length is an estimate, since a text was far too long to be tokenized whole
    shortened: int = 0  # of the records kept
    unended: int = 0  # records with a dialogue whose last turn no special token ends
    typed_special: int = 0  # records with a dialogue in which strings of special tokens are characters
    prerendered: int = 0  # records with a plain text that has strings as chat templates write them
    refusal: str = ""  # why the replies of the first record were not found that was dropped for it

    def encode(self, records: Iterable[PendingRecord]) -> Iterator[Example]:
        """Yield the examples of records, in order. `kept`, `dropped` and `shortened` grow as it is consumed.

        Raises:
            ValueError: the chat template refuses a dialogue; the message names the record.
        """
        batch, characters = [], 0
        for record in records:
            if texts := self._render(record):
                batch.append((record, texts))
                characters += sum(text.length for text in texts)
            if len(batch) == BATCH_RECORDS or characters > BATCH_CHARACTERS:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        if batch:
            yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[tuple[PendingRecord, list[Rendered]]]) -> Iterator[Example]:
        tokenized = self._tokenize([text for _, texts in batch for text in texts])
        start = 0
        for record, texts in batch:
            example = self._fit(record, tokenized[start : start + len(texts)])
            start += len(texts)
            if example is not None:
                self.kept.append(record.index)
                yield example

    def _render(self, record: PendingRecord) -> list[Rendered] | None:
        """The record's texts, ready to tokenize; None if the record is dropped."""
        texts = record.texts
        if self.task.reads_demonstrations:
            texts = [_until_last_reply(text) for text in texts]
        if any(isinstance(text, list) and (not text or text[-1]["role"] != "assistant") for text in texts):
            return self._drop(record, "not ending with an assistant message")
        if self.task.reads_demonstrations and not any(_has_content(text, record.loss_from) for text in texts):
            return self._drop(record, "with empty text")
        if self.task is Task.PREFERENCE and record.sample.lacks_prompt:
            return self._drop(record, "with an empty prompt")
        if self.task is Task.REGRESSION and np.isnan(record.sample.attributes).all():
            return self._drop(record, "without any of the numbers of --attributes")
        # Such as HelpSteer2, shuffled: the rows of one prompt are apart.
        if self.task is Task.PREFERENCE and len(texts) < 2:
            return self._drop(record, "with fewer than two replies to compare")
        if self.task is Task.PREFERENCE and record.sample.grade is None:
            return self._drop(record, "without ranks, scores or a winner, so no reply is known to be better")
        try:
            rendered = [self._render_text(text, record) for text in texts]
        except RepliesNotFound as error:
            self.refusal = self.refusal or f"{record.location}: {error}"
            return self._drop(record, "whose replies cannot be found in what the chat template writes")
        except ValueError as error:
            raise ValueError(f"{record.location}: {error}") from None
        if self.cut is None and (length := next(filter(None, map(self._length_if_far_over, rendered)), 0)):
            self.lengths.append(length)
            self.estimated += 1
            return self._drop(record, f"longer than --max_length {self.max_length}")
        self.unended += any(not text.plain and text.end is None for text in rendered)
        self.typed_special += any(text.typed_special for text in rendered)
        self.prerendered += any(isinstance(text, str) and self._looks_prerendered(text) for text in texts)
        return rendered

    def _render_text(self, text: Text | Rendered, record: PendingRecord) -> Rendered:
        if isinstance(text, Rendered):  # by a template that ran elsewhere
            return text
        if isinstance(text, str):
            if record.sample.tools or record.sample.template_kwargs:
                raise ValueError(
                    "has tools, or variables for a chat template, but its texts are plain, so that none writes them: "
                    "give a --chat_template, or --ignore_keys tools functions chat_template_kwargs enable_thinking"
                )
            return self._plain(text, record.loss_from)
        if self.template is None:
            folder = self.tokenizer.folder
            raise ValueError(
                f"has messages, but {folder} has no chat template; give --chat_template or --dialogue_format"
            )
        sample = record.sample
        rendered = self.template.render(text, self.task is Task.SFT, sample.tools, sample.template_kwargs)
        if self.task is Task.SFT and (sample.without_loss or self.train_on == "last"):
            rendered = replace(rendered, spans=self._chosen_spans(text, rendered.spans, sample.without_loss))
        return rendered

    def _plain(self, text: str, loss_from: int) -> Rendered:
        """A plain text: one string, or, if special tokens are parsed, what is between them, and they."""
        if not self.parse_special_tokens:
            return Rendered([text], [(loss_from, len(text))])
        prompt, reply = (self.tokenizer.split_special(part) for part in (text[:loss_from], text[loss_from:]))
        parts = [*prompt, *reply]
        rendered = Rendered(parts, [])
        start = Rendered(prompt, []).length
        return replace(rendered, spans=[(start, rendered.length)], end=_ending_special(parts))

    def _chosen_spans(self, dialogue: list, spans: list[Span], without_loss: frozenset[int]) -> list[Span]:
        """Of the spans of all replies those that carry loss."""
        replies = [i for i, message in enumerate(dialogue) if message["role"] == "assistant"]
        if len(spans) != len(replies):
            raise RepliesNotFound(
                f"{self.template.name} marks {len(spans)} parts by {{% generation %}} for {len(replies)} replies, so "
                f"that single replies cannot be left out"
            )
        trained = replies[-1:] if self.train_on == "last" else replies
        return [span for i, span in zip(replies, spans, strict=True) if i in trained and i not in without_loss]

    def _length_if_far_over(self, text: Rendered) -> int:
        """About how many tokens a very long text has whose beginning has too many already; 0: it is no such text.

        Its rest is not tokenized.
        """
        if text.length <= FAR_OVER * self.max_length:
            return 0
        beginning, length = [], 0
        for part in text.parts:
            piece = part if not isinstance(part, str) else part[: FAR_OVER * self.max_length // 2 - length]
            beginning.append(piece)
            length += 1 if not isinstance(part, str) else len(piece)
            if length >= FAR_OVER * self.max_length // 2:
                break
        ((ids, _),) = self.tokenizer.encode_parts([beginning])
        # The last tokens of the beginning may be other ones in the whole text, but not half of them.
        return len(ids) * text.length // length if len(ids) > 2 * self.max_length else 0

    @cached_property
    def _special_strings(self) -> list[tuple[str, list[str]]]:
        """Strings of special tokens, and those that templates write, by their first character: most texts lack it."""
        by_beginning: dict[str, list[str]] = {}
        for special in {*self.tokenizer.special, *TEMPLATE_STRINGS}:
            by_beginning.setdefault(special[:1], []).append(special)
        return list(by_beginning.items())

    def _looks_prerendered(self, text: str) -> bool:
        if self.parse_special_tokens:
            return False
        return any(
            any(special in text for special in specials)
            for beginning, specials in self._special_strings
            if beginning in text
        )

    def _tokenize(self, texts: list[Rendered]) -> list[TokenizedText]:
        """The tokens of each text, with BOS and EOS, and which of them carry loss."""
        # Finding where in the text each token lies takes time, so texts that do not need it go separately.
        plain = [i for i, text in enumerate(texts) if self._is_plain(text)]
        others = [i for i, text in enumerate(texts) if not self._is_plain(text)]
        plain_ids = self.tokenizer.encode_batch([texts[i].parts[0] for i in plain])
        other_ids = self.tokenizer.encode_parts([texts[i].parts for i in others])
        tokenized: dict[int, TokenizedText] = {}
        for i, ids in zip(plain, plain_ids, strict=True):
            tokenized[i] = self._complete(texts[i], ids, None)
        for i, (ids, token_spans) in zip(others, other_ids, strict=True):
            tokenized[i] = self._complete(texts[i], ids, token_spans)
        return [tokenized[i] for i in range(len(texts))]

    def _is_plain(self, text: Rendered) -> bool:
        """Whether a text is one string without special tokens, all of which carries loss if any of it does."""
        first = text.parts[0]
        if len(text.parts) > 1 or not isinstance(first, str):
            return False
        return self.task is not Task.SFT or text.spans == [(0, len(first))]

    def _complete(self, text: Rendered, ids: list[int], token_spans: Spans | None) -> TokenizedText:
        """Add BOS and EOS where they are missing, and find the tokens that carry loss.

        A token carries loss if any of its characters does, BOS if the first character does, EOS if the last one does.

        Args:
            token_spans: (start, end) of each token's text; None if all tokens carry loss.
        """
        bos = [self.tokenizer.bos_id] if text.plain and self.tokenizer.bos_id is not None else []
        if bos and text.parts[0] == self.tokenizer.bos_id:  # a plain text whose special tokens are parsed
            bos = []
        needs_eos = text.end is None and (text.plain or self.task is Task.SFT)
        eos = [self.tokenizer.eos_id] if needs_eos else []
        tokens = np.array([*bos, *ids, *eos], np.int32)
        loss, n_last = np.ones(len(tokens), bool), len(eos)
        if token_spans is not None and text.end is not None and not eos:
            n_last = sum(start >= text.end for start, _ in token_spans)
        if token_spans is not None and self.task is Task.SFT:
            length = text.length
            bos_spans = [(0, 1)] * len(bos)
            eos_spans = [(length - 1, length)] * len(eos)
            start, end = np.array([*bos_spans, *token_spans, *eos_spans]).T
            # Where one character is several tokens, sentencepiece may give its span to the last of them only. The
            # others' spans are empty and lie at its start: they count as if they were that character.
            end = np.maximum(end, start + 1)
            loss = _overlap(start, end, text.spans)
        return TokenizedText(tokens, loss, n_last)

    def _fit(self, record: PendingRecord, texts: list[TokenizedText]) -> Example | None:
        """The example of a record, truncated if necessary; None if the record is dropped."""
        sample = record.sample
        longest = max(len(text.tokens) for text in texts)
        self.lengths.append(longest)
        if not all(len(text.tokens) for text in texts):  # a template may write nothing but white space
            return self._drop(record, "with empty text")
        if self._has_no_signal(sample, texts):
            if self.task is Task.SFT:
                return self._drop(record, "without a token that carries loss")
            return self._drop(record, "with equal texts that are graded differently")
        if longest > self.max_length:
            if self.cut is None:
                return self._drop(record, f"longer than --max_length {self.max_length}")
            texts = self._cut_left(texts) if self.cut == "left" else [self._cut_right(text) for text in texts]
            if texts is None:
                return self._drop(record, f"whose replies alone are longer than --max_length {self.max_length}")
            # What made the difference between the texts, or all that carried loss, may have been cut off.
            if self._has_no_signal(sample, texts):
                reason = f"with nothing to learn from after truncation to --max_length {self.max_length}"
                return self._drop(record, reason)
            self.shortened += 1
        if self.padding_id is not None:
            texts = [_without_padding(text, self.padding_id) for text in texts]
        # A single text (SFT) has no other to share a prefix with.
        prefix_length = common_prefix([text.tokens for text in texts]) if len(texts) > 1 else 0
        return Example(
            prefix=texts[0].tokens[:prefix_length],
            replies=tuple(text.tokens[prefix_length:] for text in texts),
            loss=tuple(text.loss[prefix_length:] for text in texts),
            grade=None if sample.grade is None else np.array(sample.grade, np.float32),
            label=sample.label,
            margin=sample.margin,
            weight=sample.weight,
            strength=sample.strength,
            attributes=np.array(sample.attributes, np.float32),
            conversation=record.conversation,
            prompt=record.prompt,
        )

    def _drop(self, record: PendingRecord, reason: str) -> None:
        self.dropped.setdefault(reason, array("q")).append(record.index)
        first = self.first_dropped.setdefault(reason, record)
        if record.index < first.index:  # a later one may be known to be too long before its batch is tokenized
            self.first_dropped[reason] = record

    def _has_no_signal(self, sample: Sample, texts: list[TokenizedText]) -> bool:
        """SFT: no token carries loss. Otherwise: equal texts are graded differently, so no reward can be right."""
        if self.task is Task.SFT:
            return not any(text.loss[1:].any() for text in texts)  # nothing predicts the first token
        grades = sample.grade or [0.0] * len(texts)
        grade_of: dict[bytes, float] = {}  # tokens -> grade of the first text with these tokens
        for text, grade in zip(texts, grades, strict=True):
            key = text.tokens.tobytes()
            if key not in grade_of:
                grade_of[key] = grade
            elif grade_of[key] != grade:
                return True
        return False

    def _cut_left(self, texts: list[TokenizedText]) -> list[TokenizedText] | None:
        """Truncate texts at their beginning, behind BOS; None if the replies alone are too long.

        The same tokens are removed from every text, as many as the longest needs: they still share a prefix then.
        """
        tokens = [text.tokens for text in texts]
        start = 1 if tokens[0][0] == self.tokenizer.bos_id else 0
        end = start + max(map(len, tokens)) - self.max_length
        # Up to here tokens may be removed: within the common prefix, or, of a single text, all but its last token.
        limit = common_prefix(tokens) if len(tokens) > 1 else len(tokens[0]) - 1
        if end > limit:
            return None
        removed = slice(start, end)
        return [
            TokenizedText(np.delete(text.tokens, removed), np.delete(text.loss, removed), text.n_last) for text in texts
        ]

    def _cut_right(self, text: TokenizedText) -> TokenizedText:
        """Truncate a text that is too long at its end, but keep the token that ends its last turn and what follows it.

        These tokens carry no loss then: the text does not really end there, and SFT must not learn that it does.
        """
        length, n_last = len(text.tokens), min(text.n_last, self.max_length)
        if length <= self.max_length:
            return text
        removed = slice(self.max_length - n_last, length - n_last)
        loss = text.loss.copy()
        loss[length - n_last :] = False
        return TokenizedText(np.delete(text.tokens, removed), np.delete(loss, removed), n_last)


def _overlap(start: np.ndarray, end: np.ndarray, spans: list[Span]) -> np.ndarray:
    """(T,) bool: which tokens, from `start` to `end`, have a character in one of the spans, which are in order."""
    if not spans:
        return np.zeros(len(start), bool)
    span_starts, span_ends = np.array(spans).T
    behind = np.iinfo(np.int64).max  # stands for the start of a span behind the last one
    next_span = np.searchsorted(span_ends, start, side="right")  # the first that ends behind the token's start
    return np.append(span_starts, behind)[next_span] < end


def _without_padding(text: TokenizedText, padding_id: int) -> TokenizedText:
    """A text up to its last token that is not padding: the first one, as in transformers, if all of them are."""
    (others,) = np.nonzero(text.tokens != padding_id)
    length = int(others[-1]) + 1 if len(others) else 1
    return TokenizedText(text.tokens[:length], text.loss[:length], text.n_last)


def _ending_special(parts: Sequence[str | int]) -> int | None:
    """The position of the special token that ends a text, white space aside; None if there is none."""
    position, end = 0, None
    for part in parts:
        if isinstance(part, str):
            end = end if part.isspace() else None
            position += len(part)
        else:
            end = position
            position += 1
    return end


def _until_last_reply(text: Text) -> Text:
    """A dialogue without the messages after its last reply: they are no demonstration."""
    if isinstance(text, str):
        return text
    replies = [i for i, message in enumerate(text) if message["role"] == "assistant"]
    return text[: replies[-1] + 1] if replies else text


def _has_content(text: Text, loss_from: int) -> bool:
    """Whether any characters can carry loss: behind `loss_from` of a plain text, or in a reply of a dialogue."""
    if isinstance(text, str):
        return len(text) > loss_from
    replies = [message for message in text if message["role"] == "assistant"]
    return any(message["content"] or message.keys() & set(WRITTEN) for message in replies)
