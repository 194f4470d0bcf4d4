"""Examples: a prefix and its replies, N of them stored flat, so that they can be mapped from disk and read vectorised.

A text to imitate has an empty prefix and one reply; a preference pair has two replies, the chosen one first; a ranking
has any number of them in any order, and their grades say which is better. The prefix is what the replies' full texts
have in common, token by token, so sharing it is exact.
"""

import hashlib
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

_ONE_EACH = ("starts", "prefix_lengths", "label", "margin", "conversation", "record")  # arrays of Examples


@dataclass(frozen=True, eq=False)
class Example:
    """A prefix of P tokens and K replies that continue it, the best one first unless `grade` says otherwise."""

    prefix: np.ndarray  # (P,) int32
    replies: tuple[np.ndarray, ...]  # K arrays of int32, none empty
    loss: tuple[np.ndarray, ...]  # K arrays of bool, as long as the replies: which tokens carry SFT loss
    grade: np.ndarray | None = None  # (K,) float32: higher is better, equal is a tie; None is K - 1, ..., 0
    label: float = 1.0  # how probable it is that the grades are right; for a pair 0.5 is a tie
    margin: float = 0.0  # by how much a better reply's reward should exceed a worse one's
    conversation: int | None = None  # the same for all records of one conversation; None: it has one of its own


@dataclass(eq=False, repr=False)
class Examples(Sequence[Example]):
    """N examples with R replies and T tokens in all, stored flat: prefix, reply, reply, prefix, ...

    `examples[i]` is an Example, `examples[a:b]` and `examples.select(numbers)` are views of some of them; none copies
    tokens.
    """

    tokens: np.ndarray  # (T,) int32, and of a view also those of the examples that it leaves out
    loss: np.ndarray  # (T,) bool; a prefix carries none
    starts: np.ndarray  # (N,) where in `tokens` each example begins
    prefix_lengths: np.ndarray  # (N,)
    reply_lengths: np.ndarray  # (R,) example i has reply_lengths[reply_offsets[i] : reply_offsets[i + 1]]
    reply_offsets: np.ndarray  # (N + 1,)
    grade: np.ndarray  # (R,) float32
    label: np.ndarray  # (N,) float32
    margin: np.ndarray  # (N,) float32
    conversation: np.ndarray  # (N,) int64, as `rm.data.conversation.key` has it
    record: np.ndarray  # (N,) the number of the record it came from, from 0 over all files of the call

    def __post_init__(self):
        reply_ends = np.append(0, np.cumsum(self.reply_lengths))
        self.lengths = self.prefix_lengths + np.diff(reply_ends[self.reply_offsets])  # (N,)
        assert len(self.tokens) == len(self.loss) and len(self.grade) == len(self.reply_lengths)
        assert len(self.record) == len(self.label) == len(self.margin) == len(self.conversation) == len(self.starts)

    @classmethod
    def build(cls, examples: Iterable[Example], record: Sequence[int] | None = None) -> "Examples":
        """Store examples as they come. `record` is read after the last one; without it they are counted."""
        tokens, loss = array("i"), array("b")  # grow in place, 4 bytes and 1 byte a token
        prefix_lengths, reply_lengths, reply_offsets = array("q"), array("q"), array("q", [0])
        starts, conversation = array("q"), array("q")
        grade, label, margin = array("f"), array("f"), array("f")
        for number, example in enumerate(examples):
            starts.append(len(tokens))
            tokens.frombytes(np.concatenate([example.prefix, *example.replies]).astype(np.int32).tobytes())
            loss.frombytes(np.concatenate([np.zeros(len(example.prefix), bool), *example.loss]).tobytes())
            prefix_lengths.append(len(example.prefix))
            reply_lengths.extend(map(len, example.replies))
            reply_offsets.append(len(reply_lengths))
            grade.extend(reversed(range(len(example.replies))) if example.grade is None else example.grade)
            label.append(example.label)
            margin.append(example.margin)
            conversation.append(number if example.conversation is None else example.conversation)
        rest = starts, prefix_lengths, reply_lengths, reply_offsets, grade, label, margin, conversation
        record = range(len(prefix_lengths)) if record is None else record
        return cls(np.asarray(tokens), np.asarray(loss).view(bool), *map(np.asarray, rest), np.array(record, np.int64))

    def __len__(self) -> int:
        return len(self.prefix_lengths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        i = range(len(self))[operator.index(index)]
        start, at = self.starts[i], self.starts[i] + self.prefix_lengths[i]
        prefix, replies, loss = self.tokens[start:at], [], []
        mine = slice(self.reply_offsets[i], self.reply_offsets[i + 1])
        for length in self.reply_lengths[mine]:
            replies.append(self.tokens[at : at + length])
            loss.append(self.loss[at : at + length])
            at += length
        judged = self.grade[mine], float(self.label[i]), float(self.margin[i]), int(self.conversation[i])
        return Example(prefix, tuple(replies), tuple(loss), *judged)

    def select(self, numbers: np.ndarray) -> "Examples":
        """A view of the examples with these numbers, which must not fall."""
        assert (np.diff(numbers) >= 0).all()
        counts = np.diff(self.reply_offsets)[numbers]
        offsets = np.append(0, np.cumsum(counts))
        replies = np.arange(offsets[-1]) + np.repeat(self.reply_offsets[numbers] - offsets[:-1], counts)
        one_each = {name: getattr(self, name)[numbers] for name in _ONE_EACH}
        lengths, grade = self.reply_lengths[replies], self.grade[replies]
        return replace(self, reply_lengths=lengths, reply_offsets=offsets, grade=grade, **one_each)

    def _alone(self) -> "Examples":
        """The same examples with no other's tokens beside theirs: copied, if this is a view."""
        starts = np.cumsum(self.lengths) - self.lengths
        if len(self.tokens) == self.lengths.sum() and np.array_equal(self.starts, starts):
            return self
        at = np.repeat(self.starts - starts, self.lengths) + np.arange(self.lengths.sum())
        return replace(self, tokens=self.tokens[at], loss=self.loss[at], starts=starts)

    @cached_property
    def hash(self) -> str:
        """sha256 of what is trained on, wherever it came from: all but `record` and `conversation`."""
        digest, alone = hashlib.sha256(), self._alone()
        for name in (f.name for f in fields(self) if f.name not in ("record", "conversation")):
            values = np.ascontiguousarray(getattr(alone, name))
            digest.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
            digest.update(values)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write one .npy file for each array."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        alone = self._alone()
        for f in fields(self):
            np.save(Path(folder, f"{f.name}.npy"), getattr(alone, f.name), allow_pickle=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Examples":
        """Map what `save` wrote into memory, to read only."""
        files = (Path(folder, f"{f.name}.npy") for f in fields(cls))
        return cls(*(np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for file in files))
