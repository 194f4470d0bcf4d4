"""What an audit keeps of each record: hashes and lengths in flat arrays, never the text itself.

Shapes: N records, M (prefix, record) entries of the index.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from rm.data.conversation import beginnings, key
from rm.data.messages import Message
from rm.data.reader import KeySettings, SampleReader
from rm.data.schemas import PREFERENCE, SFT

NOT_COLUMNS = ("prefixes", "subsets", "schemas", "passed_over")  # fields of Pairs that are not one value for each pair


@dataclass(frozen=True)
class PrefixIndex:
    """An index from the hash of every dialogue prefix that ends in a reply to the records that contain it."""

    hashes: np.ndarray  # (M,) int64, sorted
    record: np.ndarray  # (M,) index of the record that contains the prefix; a record has each hash at most once

    def count(self, hashes: np.ndarray) -> np.ndarray:
        """The number of records that contain each of the given prefixes; same shape as `hashes`."""
        return np.searchsorted(self.hashes, hashes, "right") - np.searchsorted(self.hashes, hashes)

    def records_with(self, hash: int) -> np.ndarray:
        """The indices of the records that contain this prefix."""
        return self.record[np.searchsorted(self.hashes, hash) : np.searchsorted(self.hashes, hash, "right")]

    def select(self, mask: np.ndarray) -> "PrefixIndex":
        """The index of those records for which `mask`, (N,) bool, is true; they are renumbered from 0."""
        kept = mask[self.record]
        new_index = np.cumsum(mask) - 1
        return PrefixIndex(self.hashes[kept], new_index[self.record[kept]])


@dataclass(frozen=True)
class Texts:
    """N dialogues for SFT. `prefixes` covers each of them up to the end of every reply, the last one included."""

    where: np.ndarray  # (N,) str: "file line 12"
    conversation: np.ndarray  # (N,) int64 hash of the first human turn: `rm.data.conversation.key`
    prefixes: PrefixIndex

    def __len__(self) -> int:
        return len(self.where)


@dataclass(frozen=True)
class Pairs(Texts):
    """N preferences; of a ranking, its best and its worst reply. In arrays of shape (N, 2) the better one comes first.

    `prefixes` covers the prompts only, without the last turns: that a pair contains a dialogue as one of its two sides
    does not reveal which side is the better one, that its prompt continues the dialogue usually does.
    """

    full_hash: np.ndarray  # (N, 2) int64 hash of all turns
    prompt_hash: np.ndarray  # (N, 2) int64 hash of all turns but the last
    continued_by_other: np.ndarray  # (N, 2) bool: this side is a prefix of the pair's other side
    has_reply: np.ndarray  # (N, 2) bool: the last turn is the assistant's and not blank
    reply_length: np.ndarray  # (N, 2) characters of the last turn
    length: np.ndarray  # (N, 2) characters of all turns
    human_turns: np.ndarray  # (N, 2) number of human turns
    tied: np.ndarray  # (N,) bool: neither side is better
    subset: np.ndarray  # (N,) index into `subsets`
    record: np.ndarray  # (N,) number of the (first) record, as in `rm.data.reader`
    subsets: list[str]
    schemas: dict[str, int]  # name -> number of records
    passed_over: list[str]  # keys of records that have no meaning here

    def select(self, mask: np.ndarray) -> "Pairs":
        """The pairs for which `mask`, (N,) bool, is true."""
        columns = [field.name for field in fields(self) if field.name not in NOT_COLUMNS]
        selected = {name: getattr(self, name)[mask] for name in columns}
        return replace(self, prefixes=self.prefixes.select(mask), **selected)


def read_texts(paths: Sequence[str | Path], keys: KeySettings | None = None) -> Texts:
    """Read SFT files.

    Raises:
        ValueError: a record is not a demonstration; the message says where it is.
    """
    builder = _TextsBuilder()
    for located in SampleReader(SFT, keys).read(paths):
        dialogue = _Dialogue(*located.sample.dialogues())
        builder.add(located.where, dialogue, dialogue.reply_prefixes)
    return Texts(*builder.arrays())


def read_pairs(paths: Sequence[str | Path], keys: KeySettings | None = None) -> Pairs:
    """Read preference files, as training reads them. A pair's subset is the record's, otherwise the file's name.

    Raises:
        ValueError: a record is not a preference; the message says where it is.
    """
    builder, reader = _TextsBuilder(), SampleReader(PREFERENCE, keys)
    subset_index: dict[str, int] = {}
    subset, columns, tied, record = array("q"), array("q"), array("b"), array("q")
    for number, file, where, sample in reader.read(paths):
        try:
            better, worse = map(_Dialogue, sample.best_and_worst())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        prompt_prefixes = better.reply_prefixes & better.proper_prefixes
        prompt_prefixes |= worse.reply_prefixes & worse.proper_prefixes
        builder.add(where, better, prompt_prefixes)
        for values in (
            (better.full_hash, worse.full_hash),
            (better.prompt_hash, worse.prompt_hash),
            (better.full_hash in worse.proper_prefixes, worse.full_hash in better.proper_prefixes),
            (better.has_reply, worse.has_reply),
            (better.reply_length, worse.reply_length),
            (better.length, worse.length),
            (better.human_turns, worse.human_turns),
        ):
            columns.extend(values)
        subset.append(subset_index.setdefault(sample.subset or Path(paths[file]).name, len(subset_index)))
        tied.append(sample.is_tied)
        record.append(number)
    # (N, 7 columns, 2 sides) -> 7 arrays of (N, 2)
    full_hash, prompt_hash, continued_by_other, has_reply, *lengths = np.moveaxis(
        np.asarray(columns).reshape(-1, 7, 2), 1, 0
    )
    return Pairs(
        *builder.arrays(),
        full_hash,
        prompt_hash,
        continued_by_other > 0,
        has_reply > 0,
        *lengths,
        np.asarray(tied) > 0,
        np.asarray(subset),
        np.asarray(record),
        list(subset_index),
        dict(reader.schemas),
        reader.passed_over,
    )


class _Dialogue:
    """Hashes and lengths of one dialogue."""

    def __init__(self, messages: list[Message]):
        hashes, last = beginnings(messages), messages[-1]
        self.conversation, self.full_hash = key(messages), hashes[-1]
        self.prompt_hash = hashes[-2] if len(hashes) > 1 else 0
        self.proper_prefixes = set(hashes[:-1])  # shorter than the dialogue itself
        self.reply_prefixes = {
            hash for hash, message in zip(hashes, messages, strict=True) if message["role"] == "assistant"
        }
        self.has_reply = last["role"] == "assistant" and bool(last["content"].strip())
        self.reply_length = len(last["content"])
        self.length = sum(len(message["content"]) for message in messages)
        self.human_turns = sum(message["role"] == "user" for message in messages)


class _TextsBuilder:
    """Collects the fields of `Texts` record by record."""

    def __init__(self):
        self.where, self.conversation, self.hashes, self.record = [], array("q"), array("q"), array("q")

    def add(self, where: str, dialogue: _Dialogue, prefixes: set[int]) -> None:
        """Append a record with the conversation of `dialogue` and the hashes `prefixes`."""
        self.hashes.extend(prefixes)
        self.record.extend([len(self.where)] * len(prefixes))
        self.where.append(where)
        self.conversation.append(dialogue.conversation)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, PrefixIndex]:
        """The fields of `Texts`, in their order."""
        hashes = np.asarray(self.hashes)
        order = np.argsort(hashes, kind="stable")
        prefixes = PrefixIndex(hashes[order], np.asarray(self.record)[order])
        return np.array(self.where, object), np.asarray(self.conversation), prefixes
