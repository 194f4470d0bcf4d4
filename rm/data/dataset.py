"""Files to examples, for the scripts: which files, how their texts are written and shortened, what was dropped."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rm.config import REQUIRED, require_positive, setting
from rm.data import cache, chat, conversation, split
from rm.data.encode import Encoder, Item
from rm.data.examples import Examples
from rm.data.formats import Sample, demonstration, preference
from rm.data.records import read_records
from rm.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data"""

    dataset_path: tuple[str, ...] = setting(
        REQUIRED,
        "one or more files: .json, .jsonl, also gzipped, .parquet; or hub:org/name/FILE",
        may_change=True,
    )
    chat_template: str | None = setting(None, "write dialogues by this Jinja file, or as the model in this folder does")
    dialogue_format: str | None = setting(None, "or in this plain form", tuple(chat.DIALOGUE_FORMATS))
    max_length: int = setting(512, "the longest text in tokens, BOS and EOS included")
    overlong: str = setting("filter", "leave out what is longer, or shorten it", ("filter", "truncate"))
    truncation_side: str = setting("left", "where to shorten: the beginning, or the end", ("left", "right"))

    cache_dir: str = setting(cache.default_folder(), "where tokenized data is kept for the next start", may_change=True)

    def check(self) -> None:
        if self.max_length is not None:  # evaluation takes it from the model
            require_positive(self, "max_length")
        if self.chat_template is not None and self.dialogue_format is not None:
            raise ValueError("--chat_template and --dialogue_format exclude each other: give one")


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Mixture"""

    dataset_weights: tuple[float, ...] = setting((), "how often to take each file of --dataset_path, such as 1 0.5 2")

    def check(self) -> None:
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset_path):
            got = f"{len(self.dataset_weights)} for {len(self.dataset_path)} files"
            raise ValueError(f"--dataset_weights must be one number for each file of --dataset_path, got {got}")
        if not all(0 < weight < math.inf for weight in self.dataset_weights):
            raise ValueError(f"--dataset_weights must be positive, got {' '.join(map(str, self.dataset_weights))}")


@dataclass(frozen=True)
class Report:
    """What became of the records of some files."""

    kept: int
    dropped: dict[str, int]  # reason -> records
    formats: dict[str, int]  # name -> records
    files: list[int]  # records of each
    shortened: int  # of those kept

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        names = [name if count == total else f"{name} ({count:,})" for name, count in self.formats.items()]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        kept = f"{self.kept:,} kept; dropped {reasons}" if reasons else "all kept"
        shortened = f"; {self.shortened:,} shortened" if self.shortened else ""
        return f"{total:,} records of {' and '.join(names)}: {kept}{shortened}"


def load(
    read: Callable[..., tuple[Examples, Report]], settings, tokenizer: Tokenizer, say: Callable[[str], None]
) -> tuple[Examples, Examples, dict]:
    """What a training script needs of its files: (to train on, held out, facts for run.json).

    Args:
        read: `texts` or `pairs`.
        settings: DataSettings, MixtureSettings and `rm.data.split`'s SplitSettings, and a `seed`.
        say: told what was read, what was dropped, and whether the held-out data leaks.
    """
    train, report = read_once(read, settings.dataset_path, settings, tokenizer)
    say(f"data: {report}")
    facts = {"tokenizer": tokenizer.fingerprint, "train": asdict(report) | {"sha256": train.hash}}
    if settings.eval_dataset_path:
        held_out, other = read_once(read, settings.eval_dataset_path, settings, tokenizer)
        say(f"held out: {other}")
    else:
        train, held_out = split.split(train, settings.validation_split_percentage, settings.validation_split_by)
    if settings.dataset_weights:
        train = train.select(weighted(train.record, report.files, settings.dataset_weights, settings.seed))
        say(f"weights {' '.join(f'{weight:g}' for weight in settings.dataset_weights)}: {len(train):,} examples")
    if leak := split.leak(train, held_out):
        say(f"warning: {leak}")
    return train, held_out, {"data": facts | {"held_out": {"kept": len(held_out), "sha256": held_out.hash}}}


def read_once(
    read: Callable[..., tuple[Examples, Report]], paths: tuple[str, ...], settings: DataSettings, tokenizer: Tokenizer
) -> tuple[Examples, Report]:
    """`read(paths)` by one process of each machine and once for all starts: see `rm.data.cache`."""
    template = chat.choose(settings.chat_template, settings.dialogue_format, tokenizer)
    cut = settings.truncation_side if settings.overlong == "truncate" else None

    def make() -> tuple[Examples, dict]:
        examples, report = read(paths, tokenizer, settings.max_length, template, cut)
        return examples, asdict(report)

    written = template and f"{template.fingerprint} {template.asked}"
    name = [read.__name__, tokenizer.fingerprint, str(settings.max_length), str(written), str(cut)]
    examples, report = cache.open_or_make(settings.cache_dir, name, paths, make)
    return examples, Report(**report)


def texts(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    max_length: int,
    template: chat.ChatTemplate | None = None,
    cut: str | None = None,
) -> tuple[Examples, Report]:
    """Texts to imitate: loss on all of a document, on the output of text2text, on the assistant's turns of a dialogue.

    Args:
        max_length: of a text in tokens.
        template: writes the dialogues, and also text2text if it was asked for.
        cut: "left" or "right" shortens what is longer; None drops it.
    """
    return _encode(paths, demonstration, tokenizer, max_length, template, cut)


def pairs(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    max_length: int,
    template: chat.ChatTemplate | None = None,
    cut: str | None = None,
) -> tuple[Examples, Report]:
    """Preferences: the full texts of the replies, cut where their tokens part. Arguments as for `texts`."""
    return _encode(paths, preference, tokenizer, max_length, template, cut)


def replies(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    max_length: int,
    template: chat.ChatTemplate | None = None,
    cut: str | None = None,
) -> tuple[Examples, Report]:
    """As `pairs`, of records that need not say which reply is better, and may have one: to be scored, not learned."""
    return _encode(paths, preference, tokenizer, max_length, template, cut, graded=False)


def weighted(record: np.ndarray, files: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Which examples to take, some more than once, some not: for an example of weight 2.3 two, or three by chance.

    Args:
        record: (N,) number of each example's record.
        files: records of each file.
        weights: of each file.
    """
    weight = np.asarray(weights, float)[np.searchsorted(np.cumsum(files), record, side="right")]
    whole = np.floor(weight)
    copies = whole + (np.random.default_rng(seed).random(len(record)) < weight - whole)
    return np.repeat(np.arange(len(record)), copies.astype(int))


def _encode(
    paths: Sequence[str | Path],
    canonical: Callable[..., Sample],
    tokenizer: Tokenizer,
    max_length: int,
    template: chat.ChatTemplate | None,
    cut: str | None,
    graded: bool = True,
) -> tuple[Examples, Report]:
    formats, files = Counter(), [0] * len(paths)
    encoder = Encoder(tokenizer, canonical is demonstration, template, max_length, cut)

    def items() -> Iterator[Item]:
        as_messages = template is not None and template.asked
        for n, path in enumerate(paths):
            for where, record in read_records(path):
                try:
                    sample = canonical(record, as_messages)
                    # A bare prompt tells which records are of one conversation; in front of an answer it is lost.
                    known = preference(record, True) if "prompt" in record and canonical is preference else sample
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                if canonical is preference and graded and sample.grade is None:
                    raise ValueError(f"{where}: has no 'ranks' and no 'scores', so nothing says which answer is better")
                yield Item(sum(files), where, conversation.key(known.texts[0]), sample)
                formats[sample.format] += 1
                files[n] += 1

    examples = Examples.build(encoder.encode(items()), encoder.kept)
    report = Report(len(examples), dict(encoder.dropped), dict(formats), files, encoder.shortened)
    if not len(examples):
        names = ", ".join(map(str, paths)) or "no file given"
        raise ValueError(f"{names}: {report}; none is left: raise --max_length, or give other records")
    return examples, report
