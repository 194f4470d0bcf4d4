"""What an audit keeps of each record: hashes and lengths in flat arrays, never the text itself.

Shapes: N records, M (prefix, record) entries of the index.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from rm.data.conversation import beginnings, best_and_worst, key, turns
from rm.data.formats import Text, demonstration
from rm.data.records import read_records


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
    subset: np.ndarray  # (N,) index into `subsets`
    subsets: list[str]

    def select(self, mask: np.ndarray) -> "Pairs":
        """The pairs for which `mask`, (N,) bool, is true."""
        columns = [field.name for field in fields(self) if field.name not in ("prefixes", "subsets")]
        selected = {name: getattr(self, name)[mask] for name in columns}
        return replace(self, prefixes=self.prefixes.select(mask), **selected)


def read_texts(paths: Sequence[str | Path]) -> Texts:
    """Read SFT files.

    Raises:
        ValueError: a record is not a demonstration; the message says where it is.
    """
    builder = _TextsBuilder()
    for where, sample, _ in _read_samples(paths, demonstration):
        dialogue = _Dialogue(*sample.texts)
        builder.add(where, dialogue, dialogue.reply_prefixes)
    return Texts(*builder.arrays())


def read_pairs(paths: Sequence[str | Path]) -> Pairs:
    """Read preference files. The subset of a pair is the record's "subset" or, without one, the file's name.

    Raises:
        ValueError: a record is not a preference; the message says where it is.
    """
    builder = _TextsBuilder()
    subset_index: dict[str, int] = {}
    subset, columns = array("q"), array("q")
    for where, texts, subset_name in _read_samples(paths, best_and_worst):
        better, worse = map(_Dialogue, texts)
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
        subset.append(subset_index.setdefault(subset_name, len(subset_index)))
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
        np.asarray(subset),
        list(subset_index),
    )


class _Dialogue:
    """Hashes and lengths of one dialogue."""

    def __init__(self, text: Text):
        messages = turns(text)
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


def _read_samples(paths: Sequence[str | Path], parse: Callable) -> Iterator[tuple[str, object, str]]:
    """Yield (location, `parse(record)`, subset name) for every record."""
    for path in paths:
        for where, record in read_records(path):
            try:
                yield where, parse(record), str(record.get("subset") or Path(path).name)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
