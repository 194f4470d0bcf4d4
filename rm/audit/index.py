"""What an audit keeps of each record: hashes and lengths in flat arrays, never a text.

Shapes: N records, M dialogues that end in a reply.
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
    """The dialogues, each up to the end of a reply, that stand in some records: what training on them gives to read."""

    hashes: np.ndarray  # (M,) sorted
    owner: np.ndarray  # (M,) the number of the record; it has each hash once

    def count(self, wanted: np.ndarray) -> np.ndarray:
        """How many records have each of the wanted hashes."""
        return np.searchsorted(self.hashes, wanted, "right") - np.searchsorted(self.hashes, wanted)

    def owners(self, wanted: int) -> np.ndarray:
        """The numbers of the records that have this hash."""
        return self.owner[np.searchsorted(self.hashes, wanted) : np.searchsorted(self.hashes, wanted, "right")]

    def only(self, kept: np.ndarray) -> "PrefixIndex":
        """Those of the records for which `kept`, (N,) bool, is true; these are numbered anew."""
        mine = kept[self.owner]
        return PrefixIndex(self.hashes[mine], (np.cumsum(kept) - 1)[self.owner[mine]])


@dataclass(frozen=True)
class Texts:
    """N dialogues to imitate; each is among its own quotes."""

    where: np.ndarray  # (N,) str: "file line 12"
    conversation: np.ndarray  # (N,) int64, as all hashes here: `rm.data.conversation.key`
    quotes: PrefixIndex

    def __len__(self) -> int:
        return len(self.where)


@dataclass(frozen=True)
class Pairs(Texts):
    """N preferences, of a ranking its best and its worst reply; (N, 2) has the better one first.

    Only what comes before the last turns is among their quotes: whose reply is the better one is not read off there.
    """

    whole: np.ndarray  # (N, 2) hash of all turns
    prompt: np.ndarray  # (N, 2) hash of all turns but the last
    inside: np.ndarray  # (N, 2) bool: the pair's other side goes on from this one
    answered: np.ndarray  # (N, 2) bool: the last turn is the assistant's, and not blank
    reply_length: np.ndarray  # (N, 2) characters of the last turn
    length: np.ndarray  # (N, 2) characters of all turns
    human_turns: np.ndarray  # (N, 2)
    subset: np.ndarray  # (N,) a number in `subsets`
    subsets: list[str]

    def only(self, kept: np.ndarray) -> "Pairs":
        """The pairs for which `kept`, (N,) bool, is true."""
        columns = (f.name for f in fields(self) if f.name not in ("quotes", "subsets"))
        return replace(self, quotes=self.quotes.only(kept), **{name: getattr(self, name)[kept] for name in columns})


def read_texts(paths: Sequence[str | Path]) -> Texts:
    """The dialogues of SFT files. Raises ValueError for a record that is none, and says where it is."""
    notes = _Notes()
    for where, sample, _ in _samples(paths, demonstration):
        side = _Side(*sample.texts)
        notes.add(where, side, side.replies)
    return Texts(*notes.arrays())


def read_pairs(paths: Sequence[str | Path]) -> Pairs:
    """The preferences of files; a subset is named by the records' "subset", else by the file."""
    notes, subset, subsets, table = _Notes(), array("q"), {}, array("q")
    for where, texts, name in _samples(paths, best_and_worst):
        one, other = map(_Side, texts)
        notes.add(where, one, (one.replies & one.before) | (other.replies & other.before))
        for values in (
            (one.whole, other.whole),
            (one.prompt, other.prompt),
            (one.whole in other.before, other.whole in one.before),
            (one.answered, other.answered),
            (one.reply_length, other.reply_length),
            (one.length, other.length),
            (one.human_turns, other.human_turns),
        ):
            table.extend(values)
        subset.append(subsets.setdefault(name, len(subsets)))
    whole, prompt, inside, answered, *lengths = np.moveaxis(np.asarray(table).reshape(-1, 7, 2), 1, 0)
    return Pairs(*notes.arrays(), whole, prompt, inside > 0, answered > 0, *lengths, np.asarray(subset), list(subsets))


class _Side:
    """One text, taken apart."""

    def __init__(self, text: Text):
        messages = turns(text)
        hashes, last = beginnings(messages), messages[-1]
        self.conversation, self.whole = key(messages), hashes[-1]
        self.prompt = hashes[-2] if len(hashes) > 1 else 0
        self.before = set(hashes[:-1])
        self.replies = {hash for hash, message in zip(hashes, messages, strict=True) if message["role"] == "assistant"}
        self.answered = last["role"] == "assistant" and bool(last["content"].strip())
        self.reply_length = len(last["content"])
        self.length = sum(len(message["content"]) for message in messages)
        self.human_turns = sum(message["role"] == "user" for message in messages)


class _Notes:
    """The columns of Texts, as they grow."""

    def __init__(self):
        self.where, self.conversation, self.hashes, self.owner = [], array("q"), array("q"), array("q")

    def add(self, where: str, side: _Side, quotes: set[int]) -> None:
        self.hashes.extend(quotes)
        self.owner.extend([len(self.where)] * len(quotes))
        self.where.append(where)
        self.conversation.append(side.conversation)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, PrefixIndex]:
        hashes = np.asarray(self.hashes)
        order = np.argsort(hashes, kind="stable")
        quotes = PrefixIndex(hashes[order], np.asarray(self.owner)[order])
        return np.array(self.where, object), np.asarray(self.conversation), quotes


def _samples(paths: Sequence[str | Path], read: Callable) -> Iterator[tuple[str, object, str]]:
    """(place, sample, subset) of each record."""
    for path in paths:
        for where, record in read_records(path):
            try:
                yield where, read(record), str(record.get("subset") or Path(path).name)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
