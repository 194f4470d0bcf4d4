"""Records to examples: texts are tokenized once and stored flat; what is dropped is counted.

The two full texts of a pair are tokenized each on its own, and their prefix is what the tokens share: exact, whatever
a tokenizer does where prompt and reply meet. This is the one place where BOS and EOS are put on.
"""

import itertools
import re
import reprlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rm import cache, conversation, losses, split
from rm.config import REQUIRED, require_positive, setting
from rm.examples import Example, Examples
from rm.formats import conversations as conversations
from rm.records import read_records
from rm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data"""

    dataset_path: tuple[str, ...] = setting(
        REQUIRED, "one or more files, .json or .jsonl, may be gzipped", may_change=True
    )
    max_length: int = setting(512, "leave out what is longer than this many tokens, BOS and EOS included")

    cache_dir: str = setting(cache.default_folder(), "where tokenized data is kept for the next start", may_change=True)

    def check(self) -> None:
        require_positive(self, "max_length")


@dataclass(frozen=True)
class Report:
    """What became of the records of some files."""

    kept: int
    dropped: dict[str, int]  # reason -> records

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"{total:,} records: " + (f"{self.kept:,} kept; dropped {reasons}" if reasons else "all kept")


def load(
    read: Callable[..., tuple[Examples, Report]], settings, tokenizer: Tokenizer, say: Callable[[str], None]
) -> tuple[Examples, Examples, dict]:
    """What a training script needs of its files: (to train on, held out, facts for run.json).

    Args:
        read: `texts` or `pairs`.
        settings: DataSettings and `rm.split`'s SplitSettings.
        say: told what was read, what was dropped, and whether the held-out data leaks.
    """
    train, report = read_once(read, settings.dataset_path, settings, tokenizer)
    say(f"data: {report}")
    facts = {"tokenizer": tokenizer.fingerprint, "train": asdict(report) | {"sha256": train.hash}}
    if settings.eval_dataset_path:
        held_out, report = read_once(read, settings.eval_dataset_path, settings, tokenizer)
        say(f"held out: {report}")
    else:
        train, held_out = split.split(train, settings.validation_split_percentage, settings.validation_split_by)
    if isinstance(settings, losses.LossSettings):  # train_sft.py has none
        for examples in (train, held_out):
            losses.check_fits(examples, settings)
    if leak := split.leak(train, held_out):
        say(f"warning: {leak}")
    return train, held_out, {"data": facts | {"held_out": {"kept": len(held_out), "sha256": held_out.hash}}}


def read_once(
    read: Callable[..., tuple[Examples, Report]], paths: tuple[str, ...], settings: DataSettings, tokenizer: Tokenizer
) -> tuple[Examples, Report]:
    """`read(paths)` by one process of each machine and once for all starts: see `rm.cache`."""

    def make() -> tuple[Examples, dict]:
        examples, report = read(paths, tokenizer, settings.max_length)
        return examples, asdict(report)

    name = [read.__name__, tokenizer.fingerprint, str(settings.max_length)]
    examples, report = cache.open_or_make(settings.cache_dir, name, paths, make)
    return examples, Report(**report)


def texts(paths: Sequence[str | Path], tokenizer: Tokenizer, max_length: int) -> tuple[Examples, Report]:
    """Documents to imitate: [BOS?] text EOS of each record's "text", with loss on every token."""
    expected = 'expected "text" (preference pairs belong to train_rm.py)'
    return _encode(paths, _strings(paths, [("text",)], expected, "text_only"), tokenizer, max_length)


def pairs(paths: Sequence[str | Path], tokenizer: Tokenizer, max_length: int) -> tuple[Examples, Report]:
    """Preferences: [BOS?] text EOS of the chosen and the rejected full text, cut where their tokens part."""
    keys = [("positive", "negative"), ("chosen", "rejected")]
    expected = 'expected "positive" and "negative", or "chosen" and "rejected" (plain texts: train_sft.py)'
    return _encode(paths, _strings(paths, keys, expected, None), tokenizer, max_length)


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many first tokens all rows share, where each keeps at least its last token for itself."""
    most = min(map(len, rows)) - 1
    differs = np.zeros(most, bool)
    for row in rows[1:]:
        differs |= row[:most] != rows[0][:most]
    return int(differs.argmax()) if differs.any() else most


def _strings(
    paths: Sequence[str | Path], keysets: list[tuple[str, ...]], expected: str, document_type: str | None
) -> Iterator[tuple[str, ...]]:
    """The texts of each record, under the first of the sets of keys that it has."""
    for where, record in itertools.chain.from_iterable(read_records(path, document_type) for path in paths):
        keys = next((keys for keys in keysets if record.keys() >= set(keys)), None)
        if keys is None:
            raise ValueError(f"{where}: has the keys {', '.join(map(repr, record)) or 'none'}; {expected}")
        if "prompt" in record:  # its replies would be trained without it
            raise ValueError(f"{where}: has a 'prompt' apart; put it in front of both texts")
        for key in keys:
            text = record[key]
            if not isinstance(text, str):
                raise ValueError(f"{where}: {key!r} is {reprlib.repr(text)}; expected its text, a string")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON can write it, UTF-8 cannot
                raise ValueError(f"{where}: {key!r} has half of a surrogate pair, no character; remove it")
        yield tuple(record[key] for key in keys)


def _encode(
    paths: Sequence[str | Path], found: Iterator[tuple[str, ...]], tokenizer: Tokenizer, max_length: int
) -> tuple[Examples, Report]:
    """Tokenize the texts of each record in batches, and keep the records that fit."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    dropped, kept = Counter(), array("q")

    def fitting() -> Iterator[Example]:
        records = enumerate(found)
        while batch := list(itertools.islice(records, 1024)):  # enough for every core, soon forgotten
            ids = iter(tokenizer.encode_batch([text for _, strings in batch for text in strings]))
            for number, strings in batch:
                rows = [np.array([*bos, *next(ids), tokenizer.eos_id], np.int32) for _ in strings]
                if strings == ("",):
                    dropped["empty text"] += 1
                elif len(strings) == 2 and strings[0] == strings[1]:  # nothing to learn, and no ranking can be right
                    dropped["with two equal sides"] += 1
                elif max(map(len, rows)) > max_length:
                    dropped[f"longer than --max_length {max_length}"] += 1
                else:
                    kept.append(number)
                    yield _example(rows, conversation.key(strings[0]))

    examples = Examples.build(fitting(), kept)
    report = Report(len(examples), dict(dropped))
    if not kept:
        names = ", ".join(map(str, paths)) or "no file given"
        raise ValueError(f"{names}: {report}; none is left: raise --max_length, or give other records")
    return examples, report


def _example(rows: list[np.ndarray], conversation: int) -> Example:
    shared = common_prefix(rows) if len(rows) > 1 else 0  # a document has nothing to share with
    replies = tuple(row[shared:] for row in rows)
    loss = tuple(np.ones(len(reply), bool) for reply in replies)
    return Example(rows[0][:shared], replies, loss, conversation=conversation)
