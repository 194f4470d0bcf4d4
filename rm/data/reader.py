"""Reads files to samples: the one way in which training, evaluation, audit and preparation read data.

Records are numbered from 0 over all files read together. Where a schema has one record for each reply (HelpSteer2), the
consecutive records of one prompt are one sample, with the number and the place of the first of them.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rm.config import SettingsGroup, setting
from rm.data.records import read_records
from rm.data.sample import Sample
from rm.data.schemas import Reader
from rm.distributed import process_group as dist


@dataclass(frozen=True, kw_only=True)
class KeySettings(SettingsGroup):
    """Records"""

    data_keys: tuple[str, ...] = setting(
        (), "names that the data has for keys of records: prompt=question chosen=good rejected=bad"
    )
    ignore_keys: tuple[str, ...] = setting((), "keys of records and messages to pass over")

    def check(self) -> None:
        renamed = self.renamed
        if "" in renamed or "" in renamed.values() or len(renamed) < len(self.data_keys):
            raise ValueError(f"--data_keys must be NAME=KEY, each name once, got {' '.join(self.data_keys)}")

    @property
    def renamed(self) -> dict[str, str]:
        """Name of a key in `rm.data.schemas` -> the name that the records have for it."""
        return dict(entry.partition("=")[::2] for entry in self.data_keys)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add these settings to a command that is not made of settings."""
        add = parser.add_argument
        add("--data_keys", metavar="NAME=KEY", nargs="+", default=[], help="names of keys, as for train_rm.py")
        add("--ignore_keys", metavar="KEY", nargs="+", default=[], help="keys of records to pass over")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "KeySettings":
        """The settings that such a command was given."""
        return cls(data_keys=tuple(args.data_keys), ignore_keys=tuple(args.ignore_keys))


class Located(NamedTuple):
    """A sample, and where it was read."""

    number: int  # of its first record, counted from 0 over all files
    file: int  # index of its file
    where: str  # file and line, for messages
    sample: Sample


class SampleReader:
    """Reads files to samples, and counts what it finds.

    Args:
        script: "train_sft.py" for demonstrations, "train_rm.py" for replies to compare or to score.
        attributes: names of the numbers that a sample has to have, of those that are read as demonstrations are.

    Attributes:
        schemas: name of a schema -> number of samples.
        labels: label of a pair -> number of samples.
        records: index of a file -> number of records, of which several may be joined to one sample.
    """

    def __init__(self, script: str, keys: KeySettings | None = None, attributes: tuple[str, ...] = ()):
        keys = keys or KeySettings()
        self._reader = Reader(script, keys.renamed, frozenset(keys.ignore_keys), attributes)
        self.schemas: Counter[str] = Counter()
        self.labels: Counter[float] = Counter()
        self.records: Counter[int] = Counter()

    @property
    def passed_over(self) -> list[str]:
        """The keys without meaning that records had."""
        return sorted(self._reader.passed_over)

    @property
    def used(self) -> list[str]:
        """The keys of records that were read, named as in `rm.data.schemas`."""
        return sorted(self._reader.used)

    @property
    def not_found(self) -> list[str]:
        """Of --data_keys, those whose key no record had."""
        return [f"{ours}={key}" for ours, key in self._reader.data_keys.items() if ours not in self._reader.found]

    @property
    def nothing_ignored(self) -> list[str]:
        """Of --ignore_keys, those that neither a record nor a message had."""
        return sorted(self._reader.ignore_keys - self._reader.ignored)

    @property
    def tied(self) -> int:
        """Pairs whose two sides have equal scores, although one is called better."""
        return self._reader.tied

    def read(self, paths: Iterable[str | Path], numbers: set[int] | None = None) -> Iterator[Located]:
        """Yield the samples of files.

        Args:
            numbers: of the samples to yield; None: all. Records behind the last of them are not read.

        Raises:
            ValueError: with file and record, where a record cannot be read as it is meant.
        """
        last = None if numbers is None else max(numbers, default=-1)
        if last == -1:
            return
        for located in self._joined(self._located(paths)):
            if numbers is None or located.number in numbers:
                self.schemas[located.sample.schema] += 1
                self.labels[located.sample.label] += 1
                yield located
            if located.number == last:
                return

    def _located(self, paths: Iterable[str | Path]) -> Iterator[Located]:
        """One sample for each record."""
        number = 0
        for file, path in enumerate(paths):
            for where, record in dist.progress(read_records(path), f"reading {Path(path).name}", "records"):
                try:
                    sample = self._reader.sample(record)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                yield Located(number, file, where, sample)
                number += 1
                self.records[file] += 1

    @staticmethod
    def _joined(located: Iterable[Located]) -> Iterator[Located]:
        """Join the consecutive samples of one prompt."""
        pending: Located | None = None
        for item in located:
            if pending is not None and _belong_together(pending, item):
                before, more = pending.sample, item.sample
                together = replace(before, texts=before.texts + more.texts, grade=before.grade + more.grade)
                pending = pending._replace(sample=together)
                continue
            if pending is not None:
                yield pending
                pending = None
            if item.sample.joined_by is None:
                yield item
            else:
                pending = item
        if pending is not None:
            yield pending


def _belong_together(before: Located, after: Located) -> bool:
    return (before.file, before.sample.joined_by) == (after.file, after.sample.joined_by)
