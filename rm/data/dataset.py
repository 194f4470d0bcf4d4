"""Files to examples, for the scripts: which files, how their texts are written and shortened, what was dropped."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rm.config import REQUIRED, SettingsGroup, require_positive, setting
from rm.data import cache, conversation
from rm.data.chat import BARE_TEXT, DIALOGUE_FORMATS, ChatTemplate, bare_as_dialogue, choose_template
from rm.data.encode import Encoder, PendingRecord, Task
from rm.data.examples import Examples
from rm.data.formats import Sample, demonstration, preference
from rm.data.records import read_records
from rm.data.split import SplitSettings, leak, split
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist


@dataclass(frozen=True, kw_only=True)
class DataSettings(SettingsGroup):
    """Data"""

    dataset_path: tuple[str, ...] = setting(
        REQUIRED,
        "one or more files: .json, .jsonl, also gzipped, .parquet; or hub:org/name/FILE",
        may_change=True,
        hub="data",
    )
    cache_dir: str | None = setting(
        None, "folder that keeps tokenized data for the next start; none: $XDG_CACHE_HOME/rm", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(SettingsGroup):
    """Mixture"""

    dataset_weights: tuple[float, ...] = setting((), "how often to take each file of --dataset_path, such as 1 0.5 2")

    def check(self) -> None:
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
    """Raise ValueError where weights are given, but not one for each file."""
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
    unended: int = 0  # records with a dialogue whose last turn no special token ends

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
        return f"{total:,} records of {' and '.join(formats)}{bare}: {outcome}"


@dataclass(frozen=True)
class TrainingData:
    """What a training script reads from its files."""

    train: Examples
    held_out: Examples  # empty where nothing is held out
    facts: dict  # for run.json, and to tell whether a checkpoint is of the same data


def load(
    task: Task,
    data: DataSettings,
    text: TextSettings,
    mixture: MixtureSettings,
    held: SplitSettings,
    tokenizer: Tokenizer,
    seed: int,
) -> TrainingData:
    """Read, tokenize, split and weight a training's files. All ranks call it.

    Prints what was read, what was dropped, and whether held-out data leaks into training.
    """
    train, report = read_cached(task, data.dataset_path, text, tokenizer, data.cache_dir)
    dist.say(f"data: {report}")
    if report.unended:
        ends = "EOS is appended" if task is Task.SFT else "their rewards are read at whatever token a reply ends in"
        dist.say(
            f"warning: the chat template ends no turn with a special token in {report.unended:,} records: {ends}. A "
            f"template that does so is better"
        )
    facts = {"tokenizer": tokenizer.fingerprint, "train": asdict(report) | {"sha256": train.hash}}
    if held.eval_dataset_path:
        held_out, eval_report = read_cached(task, held.eval_dataset_path, text, tokenizer, data.cache_dir)
        dist.say(f"held out: {eval_report}")
    else:
        train, held_out = split(train, held.validation_split_percentage, held.validation_split_by)
    if weights := mixture.dataset_weights:
        train = train.select(weighted(train.record, report.files, weights, seed))
        dist.say(f"weights {' '.join(f'{weight:g}' for weight in weights)}: {len(train):,} examples")
    if warning := leak(train, held_out):
        dist.say(f"warning: {warning}")
    facts["held_out"] = {"kept": len(held_out), "sha256": held_out.hash}
    return TrainingData(train, held_out, facts)


def read_cached(
    task: Task,
    paths: Sequence[str],
    text: TextSettings,
    tokenizer: Tokenizer,
    cache_dir: str | None,
    padding_id: int | None = None,
) -> tuple[Examples, Report]:
    """`read` by one process of each machine, and once for all starts: see `rm.data.cache`."""
    template = choose_template(text.chat_template, text.dialogue_format, tokenizer)

    def make() -> tuple[Examples, dict]:
        examples, report = read(task, paths, tokenizer, text.max_length, template, text.cut, text.bare_text, padding_id)
        return examples, asdict(report)

    template_key = None if template is None else f"{template.fingerprint} {template.explicit}"
    how = [text.max_length, template_key, text.cut, text.bare_text, padding_id]
    key = [task.value, tokenizer.fingerprint, *map(str, how)]
    examples, report = cache.open_or_make(cache_dir or cache.default_folder(), key, tuple(paths), make)
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
) -> tuple[Examples, Report]:
    """Examples from files.

    SFT reads demonstrations: loss on all of a plain text, on the output of text2text, on the assistant's turns of a
    dialogue. PREFERENCE reads the full texts of a prompt's replies, which share their first tokens. SCORING reads the
    same, but needs no grades, and a prompt may have one reply. SCORED_DEMONSTRATIONS reads the texts of demonstrations.

    Args:
        max_length: of a text in tokens.
        template: writes the dialogues, and also text2text if it is explicit.
        cut: "left" or "right" shortens longer texts; None drops them.
        bare_text: as `TextSettings` has it.
        padding_id: as for `rm.data.encode.Encoder`.

    Raises:
        ValueError: with the file and record of the first mistake, or where no example is left.
    """
    formats, files = Counter(), [0] * len(paths)
    encoder = Encoder(tokenizer, task, template, max_length, cut, padding_id)
    as_messages = template is not None and template.explicit
    as_dialogue = bare_as_dialogue(bare_text, template)
    if task.reads_demonstrations and bare_text == "auto":
        as_dialogue = as_messages  # text2text is plain text unless a setting says otherwise
    bare = None

    def to_sample(record: dict) -> Sample:
        if task.reads_demonstrations:
            return demonstration(record, as_dialogue)
        return preference(record, as_messages, as_dialogue)

    def pending() -> Iterator[PendingRecord]:
        nonlocal bare
        for n, path in enumerate(paths):
            for where, record in read_records(path):
                try:
                    sample = first = to_sample(record)
                    if not task.reads_demonstrations and "prompt" in record:
                        # Records of one conversation share their first user message. Only as messages can a prompt
                        # that is a bare string be told from the reply behind it.
                        first = preference(record, as_messages, bare_as_dialogue=True)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                if task is Task.PREFERENCE and sample.grade is None:
                    raise ValueError(f"{where}: has neither 'ranks' nor 'scores', so no reply is known to be better")
                yield PendingRecord(sum(files), where, conversation.key(first.texts[0]), sample)
                formats[sample.format] += 1
                if sample.bare:
                    bare = f"bare prompts and replies {'as dialogues' if as_dialogue else 'joined'}"
                files[n] += 1

    examples = Examples.build(encoder.encode(pending()), encoder.kept)
    report = Report(
        len(examples), dict(encoder.dropped), dict(formats), files, encoder.shortened, bare, encoder.unended
    )
    if not len(examples):
        names = ", ".join(map(str, paths)) or "no file given"
        raise ValueError(f"{names}: {report}; no example is left: raise --max_length, or give other records")
    return examples, report


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
