"""Files to examples, for the scripts: which files, how their texts are written and shortened, what was dropped."""

import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rm.config import REQUIRED, SettingsGroup, require_positive, setting
from rm.data import cache, conversation, schemas
from rm.data.chat import BARE_TEXT, DIALOGUE_FORMATS, ChatTemplate, bare_as_dialogue, choose_template
from rm.data.encode import Encoder, PendingRecord, Task
from rm.data.examples import Examples
from rm.data.messages import Text
from rm.data.reader import KeySettings, SampleReader
from rm.data.sample import Bare, Sample
from rm.data.sets import ALL, UNNAMED, held_out_sets
from rm.data.split import SplitSettings, leak, split
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.files import check_regular
from rm.json_keys import Key

SHOWN_KEYS = 8  # keys passed over that the log names


@dataclass(frozen=True, kw_only=True)
class DataSettings(SettingsGroup):
    """Data"""

    dataset_path: tuple[str, ...] = setting(
        REQUIRED,
        "one or more files: .json, .jsonl, .csv, .tsv, also gzipped, .parquet; or hub:org/name[:SPLIT], "
        "hub:org/name/FILE",
        may_change=True,
        hub="data",
    )
    dataset_split: str = setting(
        "train", "the split of every hub:org/name that names neither a split nor a file, to train or to evaluate on",
        may_change=True,
    )  # fmt: skip
    cache_dir: str | None = setting(
        None, "folder that keeps tokenized data for the next start; none: $XDG_CACHE_HOME/rm", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class ReplySettings(SettingsGroup):
    """Loss"""

    train_on: str = setting("all", "the replies of a dialogue that carry loss", ("all", "last"))


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(SettingsGroup):
    """Mixture"""

    dataset_weights: tuple[float, ...] = setting(
        (), "how often to take the examples of each value of --dataset_path, such as 1 0.5 2"
    )
    max_train_samples: int | None = setting(
        None, "train on the first so many examples only, of those that are not held out; before --dataset_weights"
    )

    def check(self) -> None:
        require_positive(max_train_samples=self.max_train_samples)
        if not all(0 < weight < math.inf for weight in self.dataset_weights):
            raise ValueError(f"--dataset_weights must be positive, got {' '.join(map(str, self.dataset_weights))}")


@dataclass(frozen=True, kw_only=True)
class TextSettings(SettingsGroup):
    """Texts"""

    chat_template: str | None = setting(
        None, "write dialogues by this Jinja file, or by the chat template of this model; or hub:org/name[/FILE]",
        hub="template",
    )  # fmt: skip
    dialogue_format: str | None = setting(None, "write dialogues in this plain format", tuple(DIALOGUE_FORMATS))
    bare_text: str = setting(
        "auto",
        "a prompt and a reply that are both strings become a dialogue, or are joined; auto: a dialogue if there is a "
        "template",
        BARE_TEXT,
    )
    parse_special_tokens: bool = setting(
        False, "strings of special tokens in plain texts are these tokens: for texts that a chat template has written"
    )
    max_length: int = setting(512, "longest text in tokens, BOS and EOS included")
    overlong: str = setting("filter", "leave out longer texts, or shorten them", ("filter", "truncate"))
    truncation_side: str = setting("left", "shorten at the beginning (left) or at the end (right)", ("left", "right"))

    def check(self) -> None:
        require_positive(max_length=self.max_length)
        if self.chat_template is not None and self.dialogue_format is not None:
            raise ValueError("--chat_template and --dialogue_format exclude each other: give one")

    @property
    def cut(self) -> str | None:
        """The side at which longer texts are shortened; None where they are left out."""
        return self.truncation_side if self.overlong == "truncate" else None


def check_mixture(data: DataSettings, mixture: MixtureSettings) -> None:
    """Raise ValueError where weights are given, but not one for each file or name on the hub."""
    weights, files = len(mixture.dataset_weights), len(data.dataset_path)
    if weights and weights != files:
        raise ValueError(
            f"--dataset_weights must be one number for each file of --dataset_path, got {weights} for {files} files"
        )


@dataclass(frozen=True)
class Report:
    """What became of the records of some files."""

    kept: int
    dropped: dict[str, int]  # reason -> records
    formats: dict[str, int]  # name -> records
    files: list[int]  # records of each
    shortened: int  # of those kept
    bare: str | None = None  # how prompts and replies that are bare strings were written; None: there were none
    typed_special: int = 0  # records with a dialogue in which strings of special tokens stay characters
    used: tuple[str, ...] = ()  # keys that were read, named as in `rm.data.schemas`
    passed_over: tuple[str, ...] = ()  # keys without meaning
    first_dropped: dict[str, tuple[int, str]] = field(default_factory=dict)  # reason -> (file, place) of the first
    dropped_records: dict[str, list[int]] = field(default_factory=dict)  # reason -> numbers as in `Examples.record`
    lengths: dict[str, int] = field(default_factory=dict)  # see `_summary`
    warnings: tuple[str, ...] = ()  # what a person should know of the data, one line each

    @property
    def facts(self) -> dict:
        """What run.json and report.json say of the files."""
        return {name: value for name, value in asdict(self).items() if name != "dropped_records"}

    @property
    def reasons(self) -> dict[int, str]:
        """Number of a record that was dropped -> the reason."""
        return {number: reason for reason, numbers in self.dropped_records.items() for number in numbers}

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        bare = f", {self.bare}" if self.bare else ""
        formats = [name if count == total else f"{name} ({count:,})" for name, count in self.formats.items()]
        outcome = "all kept"
        if self.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            outcome = f"{self.kept:,} kept; dropped {reasons}"
        if self.shortened:
            outcome += f"; {self.shortened:,} shortened"
        if self.typed_special:
            outcome += f"; {self.typed_special:,} with strings of special tokens, which stay characters"
        if self.passed_over:
            more = f" and {len(self.passed_over) - SHOWN_KEYS} more" if len(self.passed_over) > SHOWN_KEYS else ""
            outcome += f"; keys passed over: {', '.join(map(shown, self.passed_over[:SHOWN_KEYS]))}{more}"
        return f"{total:,} records of {' and '.join(formats)}{bare}: {outcome}"


def say_report(name: str, report: Report) -> None:
    """Print what became of some files, and what a person should know of them."""
    dist.say(f"{name}: {report}")
    for warning in report.warnings:
        dist.say(f"warning: {name}: {warning}")


def shown(key: str) -> str:
    """A key of a record as it is printed: it may be of any length, and have any character."""
    return key if key.isidentifier() and len(key) < 40 else reprlib.repr(key)


_COUNT = Key(int, minimum=0, required=True)
_COUNTS, _NAMES = Key(dict, items=_COUNT, required=True), Key(list, items=Key(str), required=True)
REPORT_KEYS = {  # of a `Report` in the cache
    "kept": _COUNT,
    "dropped": _COUNTS,
    "formats": _COUNTS,
    "files": Key(list, items=_COUNT, required=True),
    "shortened": _COUNT,
    "bare": Key(str),
    "typed_special": _COUNT,
    "used": _NAMES,
    "passed_over": _NAMES,
    "first_dropped": Key(dict, items=Key(list), required=True),
    "dropped_records": Key(dict, items=Key(list, items=_COUNT), required=True),
    "lengths": _COUNTS,
    "warnings": _NAMES,
}


@dataclass(frozen=True)
class TrainingData:
    """What a training script reads from its files."""

    train: Examples
    held_out: dict[str, Examples]  # name -> examples, see `rm.data.sets`; empty where nothing is held out
    facts: dict  # for run.json, and to tell whether a checkpoint is of the same data


def load(
    task: Task,
    data: DataSettings,
    text: TextSettings,
    mixture: MixtureSettings,
    held: SplitSettings,
    tokenizer: Tokenizer,
    seed: int,
    keys: KeySettings | None = None,
    replies: ReplySettings | None = None,
    group_by_prompt: bool = False,
    attributes: tuple[str, ...] = (),
) -> TrainingData:
    """Read, tokenize, split and weight a training's files. All ranks call it.

    Prints what was read, what was dropped, and whether held-out data leaks into training.

    Args:
        group_by_prompt: the training examples have the keys of their prompts.
        attributes: names of the numbers that are learned (REGRESSION).
    """
    how = {"keys": keys, "train_on": replies.train_on if replies else "all", "attributes": attributes}
    train, report = read_cached(
        task, data.dataset_path, text, tokenizer, data.cache_dir, with_prompts=group_by_prompt, **how
    )
    say_report("data", report)
    if missing := [name for name, values in zip(attributes, train.attributes.T, strict=True) if np.isnan(values).all()]:
        raise ValueError(f"--attributes: no record of --dataset_path has a number {missing[0]!r}: correct the name")
    facts = {"tokenizer": tokenizer.fingerprint, "train": report.facts | {"sha256": train.hash}}
    held_out = {}
    for name, paths in held_out_sets(held.eval_dataset_path).items():
        held_out[name], eval_report = read_cached(task, paths, text, tokenizer, data.cache_dir, **how)
        say_report(f"held out, {name}" if name else "held out", eval_report)
    if held.validation_split_percentage:
        train, held_out[UNNAMED] = split(train, held.validation_split_percentage, held.validation_split_by)
    if mixture.max_train_samples is not None:
        train = train[: mixture.max_train_samples]
    if weights := mixture.dataset_weights:
        train = train.select(weighted(train.record, report.files, weights, seed))
        dist.say(f"weights {' '.join(f'{weight:g}' for weight in weights)}: {len(train):,} examples")
    facts["train"]["trained_on"] = len(train)
    facts["held_out"] = {"kept": sum(map(len, held_out.values())), "sets": {}}
    for name, examples in held_out.items():
        if warning := leak(train, examples):
            dist.say(f"warning: {f'{name}: ' if name else ''}{warning}")
        facts["held_out"]["sets"][name or ALL] = {"kept": len(examples), "sha256": examples.hash}
    return TrainingData(train, held_out, facts)


def read_cached(
    task: Task,
    paths: Sequence[str],
    text: TextSettings,
    tokenizer: Tokenizer,
    cache_dir: str | None,
    padding_id: int | None = None,
    keys: KeySettings | None = None,
    train_on: str = "all",
    with_prompts: bool = False,
    attributes: tuple[str, ...] = (),
) -> tuple[Examples, Report]:
    """`read` by one process of each machine, and once for all starts: see `rm.data.cache`."""
    for path in paths:
        check_regular(path)
    template = choose_template(text.chat_template, text.dialogue_format, tokenizer)
    keys = keys or KeySettings()

    def make() -> tuple[Examples, dict]:
        examples, report = read(
            task, paths, tokenizer, text.max_length, template, text.cut, text.bare_text, padding_id,
            text.parse_special_tokens, keys, train_on, with_prompts, attributes,
        )  # fmt: skip
        return examples, asdict(report)

    template_key = None if template is None else f"{template.fingerprint} {template.explicit}"
    how = [text.max_length, template_key, text.cut, text.bare_text, text.parse_special_tokens, padding_id, train_on]
    how += ["with prompts"] if with_prompts else []
    of_keys = [*keys.data_keys, "", *keys.ignore_keys, "", *attributes]
    key = [task.value, tokenizer.fingerprint, *map(str, how), *of_keys]
    examples, report = cache.open_or_make(cache_dir or cache.default_folder(), key, tuple(paths), make, REPORT_KEYS)
    return examples, Report(**report)


def read(
    task: Task,
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    max_length: int,
    template: ChatTemplate | None = None,
    cut: str | None = None,
    bare_text: str = "auto",
    padding_id: int | None = None,
    parse_special_tokens: bool = False,
    keys: KeySettings | None = None,
    train_on: str = "all",
    with_prompts: bool = False,
    attributes: tuple[str, ...] = (),
) -> tuple[Examples, Report]:
    """Examples from files.

    SFT reads demonstrations: loss on all of a plain text, on the reply to a prompt, on the assistant's turns of a
    dialogue. PREFERENCE reads the full texts of a prompt's replies, which share their first tokens. SCORING reads the
    same, but needs no grades, and a prompt may have one reply. SCORED_DEMONSTRATIONS reads the texts of demonstrations,
    and REGRESSION the same with the numbers that are learned of each.

    Args:
        max_length: of a text in tokens.
        template: writes the dialogues.
        cut: "left" or "right" shortens longer texts; None drops them.
        bare_text: as `TextSettings` has it.
        padding_id, parse_special_tokens, train_on: as for `rm.data.encode.Encoder`.
        keys: names of keys, and keys to pass over.
        with_prompts: examples have the key of their prompt (`rm.data.conversation.prompt_key_of`), which takes a tenth
            of the time; otherwise each has one of its own.
        attributes: names of the numbers (REGRESSION).

    Raises:
        ValueError: with the file and record of the first mistake, or where no example is left.
    """
    encoder = Encoder(tokenizer, task, template, max_length, cut, padding_id, parse_special_tokens, train_on)
    reader = SampleReader(schemas.SFT if task.reads_demonstrations else schemas.PREFERENCE, keys, attributes)
    writer = TextWriter(task, template, bare_text)

    def pending() -> Iterator[PendingRecord]:
        for number, file, where, sample in reader.read(paths):
            try:
                texts, loss_from = writer.write(sample)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            prompt = conversation.prompt_key_of(sample) if with_prompts else None
            yield PendingRecord(number, where, conversation.key_of(sample), sample, texts, loss_from, file, prompt)

    examples = Examples.build(encoder.encode(pending()), encoder.kept)
    report = Report(
        kept=len(examples),
        dropped={reason: len(numbers) for reason, numbers in encoder.dropped.items()},
        dropped_records={reason: numbers.tolist() for reason, numbers in encoder.dropped.items()},
        formats=dict(reader.schemas),
        files=[reader.records[file] for file in range(len(paths))],
        shortened=encoder.shortened,
        bare=writer.bare,
        typed_special=encoder.typed_special,
        used=tuple(reader.used),
        passed_over=tuple(reader.passed_over),
        # Without the file's path, which may change while the contents, and so the cache entry, stay.
        first_dropped={
            reason: (first.file, first.location.removeprefix(f"{paths[first.file]} "))
            for reason, first in encoder.first_dropped.items()
        },
        lengths=_summary(encoder),
        warnings=tuple(warnings(task, encoder, reader, writer)),
    )
    if not len(examples):
        names = ", ".join(map(str, paths)) or "no file given"
        refusal = f" ({encoder.refusal})" if encoder.refusal else ""
        too_long = any("--max_length" in reason for reason in encoder.dropped)
        remedy = "raise --max_length, or give other records" if too_long else "give other records"
        raise ValueError(f"{names}: {report}{refusal}; no example is left: {remedy}")
    return examples, report


def _summary(encoder: Encoder) -> dict[str, int]:
    """Of the tokens of each record's longest text, before texts are shortened or left out.

    "over" is the number of records above --max_length; the lengths of "estimated" of them are estimates.
    """
    lengths = np.asarray(encoder.lengths) if len(encoder.lengths) else np.zeros(1, int)
    return {
        "median": int(np.median(lengths)),
        "percentile_95": int(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "over": int((lengths > encoder.max_length).sum()),
        "estimated": encoder.estimated,
    }


class TextWriter:
    """Writes the texts of samples: as they stand, or as dialogues for a template.

    Attributes:
        bare: how prompts and replies that are bare strings were written; None: there were none.
        run_together: samples whose prompt and reply were joined although nothing separates them.
    """

    def __init__(self, task: Task, template: ChatTemplate | None, bare_text: str):
        self._as_dialogue = bare_as_dialogue(bare_text, template)
        explicit = template is not None and template.explicit
        # LMFlow's text2text is plain text unless a setting says otherwise.
        self._text2text_as_dialogue = explicit if bare_text == "auto" else self._as_dialogue
        self._splits_full_texts = explicit and task not in (Task.SFT, Task.SCORED_DEMONSTRATIONS)
        self.bare: str | None = None
        self.run_together = 0

    def write(self, sample: Sample) -> tuple[list[Text], int]:
        """(the full texts of a sample, the number of characters at the beginning that carry no loss)"""
        if not sample.is_bare:
            return sample.written(as_messages=self._splits_full_texts), 0
        as_dialogue = self._text2text_as_dialogue if sample.joined_by_default else self._as_dialogue
        self.bare = f"bare prompts and replies {'as dialogues' if as_dialogue else 'joined'}"
        self.run_together += not as_dialogue and any(map(_runs_together, sample.texts))
        texts = sample.written(as_dialogue, self._splits_full_texts)
        return texts, 0 if as_dialogue else sample.loss_from


def _runs_together(text: Text | Bare) -> bool:
    """Whether a prompt that is a word's or a sentence's end is joined to a reply that begins with a word."""
    return isinstance(text, Bare) and not text.prompt[-1:].isspace() and text.reply[:1].isalnum()


def warnings(task: Task, encoder: Encoder, reader: SampleReader, writer: TextWriter) -> Iterator[str]:
    """What a person should know of data that has been read."""
    if encoder.prerendered:
        yield (
            f"{encoder.prerendered:,} records have plain texts with strings such as '<|im_start|>' or '</s>', as a "
            f"chat template writes them: these are read as ordinary characters, not as special tokens. "
            f"--parse_special_tokens true reads those of this model's tokenizer as tokens"
        )
    if encoder.unended:
        ends = "EOS is appended" if task is Task.SFT else "their rewards are read at whatever token a reply ends in"
        yield (
            f"the chat template ends no turn with a special token in {encoder.unended:,} records: {ends}. A template "
            f"that does so is better"
        )
    if reader.labels[0.0] and reader.labels.keys() <= {0.0, 1.0}:
        yield (
            f"'label' is 0 in {reader.labels[0.0]:,} records and never between 0 and 1. It is the probability that "
            f"the first text is better, so 0 turns a pair round; if it is something else, --ignore_keys label"
        )
    if reader.not_found:
        yield f"no record has the key of --data_keys {' '.join(reader.not_found)}"
    if reader.nothing_ignored:
        yield f"no record has the key of --ignore_keys {' '.join(reader.nothing_ignored)}"
    if writer.run_together:
        yield (
            f"{writer.run_together:,} records have a prompt and a reply that are joined without a blank or a line "
            f"break between them: end the prompts or begin the replies with one, or give --bare_text dialogue"
        )
    if reader.tied:
        yield f"{reader.tied:,} pairs have equal scores on both sides, and count as strict preferences"


def weighted(record: np.ndarray, files: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Indices of the examples to take, some several times, some not at all: of weight 2.3 twice, or by chance thrice.

    Args:
        record: (N,) number of each example's record.
        files: records of each file.
        weights: of each file.
    """
    weight = np.asarray(weights, float)[np.searchsorted(np.cumsum(files), record, side="right")]
    whole = np.floor(weight)
    copies = whole + (np.random.default_rng(seed).random(len(record)) < weight - whole)
    return np.repeat(np.arange(len(record)), copies.astype(int))
