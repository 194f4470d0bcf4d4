"""Tokenized examples: a prefix and its replies, stored as flat arrays, which can be memory-mapped and read vectorised.

A text for SFT has an empty prefix and one reply. A preference pair has two replies, the chosen one first. A ranking has
any number of replies in any order, and their grades say which is better. The prefix is what the replies' full texts
have in common, token by token, so sharing its computation is exact.
"""

import hashlib
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rm.files import names_file

# The arrays of Examples that have one entry for each example
_PER_EXAMPLE = (
    "starts", "prefix_lengths", "label", "margin", "weight", "strength", "attributes", "conversation", "prompt",
    "record",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Example:
    """A prefix of P tokens and K replies that continue it, the best one first unless `grade` says otherwise."""

    prefix: np.ndarray  # (P,) int32
    replies: tuple[np.ndarray, ...]  # K arrays of int32, none empty
    loss: tuple[np.ndarray, ...]  # K arrays of bool, as long as the replies: which tokens carry SFT loss
    grade: np.ndarray | None = None  # (K,) float32: higher is better, equal is a tie; None is K - 1, ..., 0
    label: float = 1.0  # probability that the grades are right; for a pair 0.5 is a tie
    margin: float = 0.0  # by how much a better reply's reward should exceed a worse one's
    weight: float = 1.0  # factor of its loss
    strength: float = 1.0  # how much better the better reply is; what becomes of it is for the loss to say
    attributes: Sequence[float] = ()  # (A,) numbers that are learned of its one reply, nan where unknown
    conversation: int | None = None  # the same for all records of one conversation; None: shared with no other record
    prompt: int | None = None  # the same for all records of one prompt; None: shared with no other record


@dataclass(eq=False, repr=False)
class Examples(Sequence[Example]):
    """N examples with R replies and T tokens in all, stored flat: prefix, reply, reply, prefix, ...

    `examples[i]` is an Example; `examples[a:b]` and `examples.select(indices)` are views of some of them. None of these
    copies tokens.
    """

    tokens: np.ndarray  # (T,) int32; a view keeps those of the examples that it leaves out as well
    loss: np.ndarray  # (T,) bool: which tokens carry SFT loss; those of a prefix never do
    starts: np.ndarray  # (N,) where in `tokens` each example begins
    prefix_lengths: np.ndarray  # (N,)
    reply_lengths: np.ndarray  # (R,) those of example i are reply_lengths[reply_offsets[i] : reply_offsets[i + 1]]
    reply_offsets: np.ndarray  # (N + 1,)
    grade: np.ndarray  # (R,) float32
    label: np.ndarray  # (N,) float32
    margin: np.ndarray  # (N,) float32
    weight: np.ndarray  # (N,) float32
    strength: np.ndarray  # (N,) float32
    attributes: np.ndarray  # (N, A) float32, nan where unknown; A is 0 where replies are compared
    conversation: np.ndarray  # (N,) int64, see `rm.data.conversation.key`
    prompt: np.ndarray  # (N,) int64, see `rm.data.conversation.prompt_key_of`
    record: np.ndarray  # (N,) index of the record that it was made from, counted from 0 over all files read together

    def __post_init__(self):
        reply_ends = np.append(0, np.cumsum(self.reply_lengths))
        self.lengths = self.prefix_lengths + np.diff(reply_ends[self.reply_offsets])  # (N,) tokens of each example
        assert len(self.tokens) == len(self.loss) and len(self.grade) == len(self.reply_lengths)
        assert {len(getattr(self, name)) for name in _PER_EXAMPLE} == {len(self.reply_offsets) - 1}

    @classmethod
    def build(cls, examples: Iterable[Example], record: Sequence[int] | None = None) -> "Examples":
        """Store examples as an iterable yields them.

        Args:
            record: the record index of each example, read after the last one; None numbers the examples from 0.
        """
        # Arrays that grow in place, at 4 bytes and 1 byte per token, while the number of examples is unknown
        tokens, loss = array("i"), array("b")
        prefix_lengths, reply_lengths, reply_offsets = array("q"), array("q"), array("q", [0])
        starts, conversation, prompt = array("q"), array("q"), array("q")
        grade, label, margin, weight, strength = array("f"), array("f"), array("f"), array("f"), array("f")
        attributes = array("f")
        for index, example in enumerate(examples):
            starts.append(len(tokens))
            tokens.frombytes(np.concatenate([example.prefix, *example.replies]).astype(np.int32).tobytes())
            loss.frombytes(np.concatenate([np.zeros(len(example.prefix), bool), *example.loss]).tobytes())
            prefix_lengths.append(len(example.prefix))
            reply_lengths.extend(map(len, example.replies))
            reply_offsets.append(len(reply_lengths))
            grade.extend(reversed(range(len(example.replies))) if example.grade is None else example.grade)
            label.append(example.label)
            margin.append(example.margin)
            weight.append(example.weight)
            strength.append(example.strength)
            attributes.extend(example.attributes)
            conversation.append(index if example.conversation is None else example.conversation)
            prompt.append(index if example.prompt is None else example.prompt)
        if record is None:
            record = range(len(prefix_lengths))
        return cls(
            tokens=np.asarray(tokens),
            loss=np.asarray(loss).view(bool),
            starts=np.asarray(starts),
            prefix_lengths=np.asarray(prefix_lengths),
            reply_lengths=np.asarray(reply_lengths),
            reply_offsets=np.asarray(reply_offsets),
            grade=np.asarray(grade),
            label=np.asarray(label),
            margin=np.asarray(margin),
            weight=np.asarray(weight),
            strength=np.asarray(strength),
            attributes=np.asarray(attributes).reshape(len(starts), len(attributes) // max(1, len(starts))),
            conversation=np.asarray(conversation),
            prompt=np.asarray(prompt),
            record=np.array(record, np.int64),
        )

    def __len__(self) -> int:
        return len(self.prefix_lengths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        i = range(len(self))[operator.index(index)]  # negative indices and IndexError as for a list
        prefix_end = self.starts[i] + self.prefix_lengths[i]
        own_replies = slice(self.reply_offsets[i], self.reply_offsets[i + 1])  # in arrays of R
        replies, loss, start = [], [], prefix_end
        for length in self.reply_lengths[own_replies]:
            replies.append(self.tokens[start : start + length])
            loss.append(self.loss[start : start + length])
            start += length
        return Example(
            prefix=self.tokens[self.starts[i] : prefix_end],
            replies=tuple(replies),
            loss=tuple(loss),
            grade=self.grade[own_replies],
            label=float(self.label[i]),
            margin=float(self.margin[i]),
            weight=float(self.weight[i]),
            strength=float(self.strength[i]),
            attributes=self.attributes[i],
            conversation=int(self.conversation[i]),
            prompt=int(self.prompt[i]),
        )

    @classmethod
    def concatenate(cls, sets: "Sequence[Examples]") -> "Examples":
        """Several sets in one, a copy of them all."""
        sets = [examples._compact() for examples in sets]
        arrays = {field.name: np.concatenate([getattr(one, field.name) for one in sets]) for field in fields(cls)}
        replies = np.concatenate([np.diff(one.reply_offsets) for one in sets])
        arrays["reply_offsets"] = np.append(0, np.cumsum(replies))
        arrays["starts"] = np.append(0, np.cumsum(np.concatenate([one.lengths for one in sets])))[:-1]
        return cls(**arrays)

    def select(self, indices: np.ndarray) -> "Examples":
        """A view of the examples with these indices, which must be in ascending order and may repeat."""
        assert (np.diff(indices) >= 0).all()
        n_replies = np.diff(self.reply_offsets)[indices]
        offsets = np.append(0, np.cumsum(n_replies))
        # Of each reply in the view its index among the replies here: those of one example are consecutive in both.
        replies = np.arange(offsets[-1]) + np.repeat(self.reply_offsets[indices] - offsets[:-1], n_replies)
        per_example = {name: getattr(self, name)[indices] for name in _PER_EXAMPLE}
        lengths, grade = self.reply_lengths[replies], self.grade[replies]
        return replace(self, reply_lengths=lengths, reply_offsets=offsets, grade=grade, **per_example)

    def _compact(self) -> "Examples":
        """The same examples with their own tokens only, one after the other: a copy if this is a view."""
        starts = np.cumsum(self.lengths) - self.lengths
        if len(self.tokens) == self.lengths.sum() and np.array_equal(self.starts, starts):
            return self
        # Of each token in the copy its index here: those of one example are consecutive in both.
        source = np.repeat(self.starts - starts, self.lengths) + np.arange(self.lengths.sum())
        return replace(self, tokens=self.tokens[source], loss=self.loss[source], starts=starts)

    @cached_property
    def hash(self) -> str:
        """sha256 of what is trained on, wherever it came from: all arrays but `record`, `conversation` and `prompt`."""
        digest, compact = hashlib.sha256(), self._compact()
        for field in fields(self):
            is_absent = field.name == "attributes" and not self.attributes.size
            if is_absent or field.name in ("record", "conversation", "prompt"):
                continue
            values = np.ascontiguousarray(getattr(compact, field.name))
            digest.update(f"{field.name} {values.dtype.str} {len(values)}\n".encode())
            digest.update(values)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write one .npy file for each array."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        compact = self._compact()
        for field in fields(self):
            file, values = Path(folder, f"{field.name}.npy"), np.ascontiguousarray(getattr(compact, field.name))
            # Not np.save: its error on a full disk names neither the file nor the reason.
            with names_file(file), open(file, "wb") as out:
                np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(values))
                out.write(values.view(np.uint8).data)

    @classmethod
    def open(cls, folder: str | Path) -> "Examples":
        """Memory-map what `save` wrote, read-only."""
        arrays = {}
        for field in fields(cls):
            file = Path(folder, f"{field.name}.npy")
            arrays[field.name] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        return cls(**arrays)


def common_prefix(texts: Sequence[np.ndarray]) -> int:
    """How many leading tokens all texts share, leaving each at least its last token.

    Args:
        texts: K arrays of token ids, none empty.
    """
    longest = min(map(len, texts)) - 1
    differs = np.zeros(longest, bool)
    for text in texts[1:]:
        differs |= text[:longest] != texts[0][:longest]
    return int(differs.argmax()) if differs.any() else longest
