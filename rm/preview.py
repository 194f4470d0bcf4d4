"""Show what a training would read: the schema and the keys, what is kept and dropped, lengths, and examples.

    python -m rm.preview pairs.jsonl --model_name_or_path MODEL
    python -m rm.preview sft.json more.parquet --model_name_or_path MODEL --max_length 2048 --num_examples 5
    python -m rm.preview pairs.jsonl --model_name_or_path MODEL --json - | jq .dropped

Takes the files, or --dataset_path, and the settings of texts that train_sft.py and train_rm.py take, and reads as they
do: by the same code, and into the same cache, so that the training starts with tokenized data. Of the model only the
tokenizer and the chat template are needed. docs/data.md says what the signs in an example mean.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rm import cli
from rm.config import SettingsGroup, parse, setting
from rm.data import dataset, show, special_tokens
from rm.data.dataset import DataSettings, ReplySettings, Report, TextSettings
from rm.data.encode import Task
from rm.data.examples import Example, Examples
from rm.data.reader import KeySettings, SampleReader
from rm.data.records import read_records
from rm.data.schemas import PREFERENCE, SFT, scripts_for
from rm.data.show import BOLD, FULL, PLAIN, Screen
from rm.data.special_tokens import TokenizerSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.hf import hub
from rm.hf.build import ModelSettings

REGRESSION = "train_rm.py --loss regression"
POSITIONAL = "dataset_path"  # files may stand without a flag
NAMES = 14  # columns of the names on the left


@dataclass(frozen=True, kw_only=True)
class PreviewSettings(SettingsGroup):
    """Preview"""

    sft: bool | None = setting(
        None, "read as train_sft.py (true) or as train_rm.py (false); none: as the one that knows the first record"
    )
    attributes: tuple[str, ...] = setting((), "read as train_rm.py does with --loss regression and these --attributes")
    num_examples: int = setting(3, "show this many examples, from the beginning of the data")
    json: str | None = setting(None, "also write all of it as JSON to this file; -: to stdout, and nothing else there")

    def check(self) -> None:
        if self.num_examples < 0:
            raise ValueError(f"--num_examples must not be negative, got {self.num_examples}")
        if self.attributes and self.sft is not None:
            raise ValueError("--sft and --attributes exclude each other: give one")


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """Settings of a preview"""

    model: ModelSettings
    data: DataSettings
    preview: PreviewSettings
    keys: KeySettings
    text: TextSettings
    tokenizer: TokenizerSettings
    replies: ReplySettings


def main(settings: Settings) -> None:
    only_json = settings.preview.json == "-"
    # What reading prints is no JSON.
    with contextlib.redirect_stdout(sys.stderr) if only_json else contextlib.nullcontext():
        settings = hub.fetched(settings, weights=False)
        folder = hub.tokenizer_folder(settings.model.model_name_or_path)
        tokenizer = special_tokens.tokenizer_for(folder, settings.tokenizer, settings.text)
        script, note = script_for(settings)
        task = {SFT: Task.SFT, PREFERENCE: Task.PREFERENCE, REGRESSION: Task.REGRESSION}[script]
        examples, report = dataset.read_cached(
            task, settings.data.dataset_path, settings.text, tokenizer, settings.data.cache_dir, keys=settings.keys,
            train_on=settings.replies.train_on, attributes=settings.preview.attributes,
        )  # fmt: skip
        shown = examples[: settings.preview.num_examples]
        places = places_of(shown, script, settings)
    if not dist.is_main():
        return
    if settings.preview.json:
        found = as_json(settings, script, examples, shown, places, report, tokenizer)
        text = json.dumps(found) + "\n"
        if only_json:
            sys.stdout.write(text)
        else:
            write_atomically(Path(settings.preview.json), text)
    if not only_json:
        screen = Screen(sys.stdout)
        lines = facts(screen, settings, script, note, report)
        for n, (example, place) in enumerate(zip(shown, places, strict=True), start=1):
            title = f"example {n} of {len(examples):,}, {short(place, settings)}"
            lines += ["", *screen.example(example, tokenizer, title, FULL)]
        print("\n".join(lines))


def script_for(settings: Settings) -> tuple[str, str]:
    """(the training script whose schemas the data has, a note where they are of both)

    Raises:
        ValueError: the first record has no schema of either.
    """
    if settings.preview.attributes:
        return REGRESSION, ""
    if settings.preview.sft is not None:
        return (SFT if settings.preview.sft else PREFERENCE), ""
    where, record = next(read_records(settings.data.dataset_path[0]))
    renamed, ignored = settings.keys.renamed, frozenset(settings.keys.ignore_keys)
    found = scripts_for(record, renamed, ignored)
    if len(found) == 2:
        return PREFERENCE, f"{SFT} reads such records, too: --sft true shows how"
    return (found or [PREFERENCE])[0], ""  # where there is none, reading says so


def places_of(shown: Examples, script: str, settings: Settings) -> list[str]:
    """File and line, or record, of some examples."""
    reader = SampleReader(SFT if script == REGRESSION else script, settings.keys, settings.preview.attributes)
    numbers = set(shown.record.tolist())
    where = {located.number: located.where for located in reader.read(settings.data.dataset_path, numbers)}
    return [where[number] for number in shown.record.tolist()]


def short(place: str, settings: Settings) -> str:
    """A place without the file where there is only one."""
    paths = settings.data.dataset_path
    return place.removeprefix(f"{paths[0]} ") if len(paths) == 1 else place


def first_dropped(settings: Settings, report: Report) -> dict[str, str]:
    """Reason -> file and place of the first record that was dropped for it."""
    return {reason: f"{settings.data.dataset_path[file]} {place}" for reason, (file, place) in
            report.first_dropped.items()}  # fmt: skip


def facts(screen: Screen, settings: Settings, script: str, note: str, report: Report) -> list[str]:
    """The lines above the examples."""
    lines: list[str] = []

    def say(name: str, text: str, style: str = PLAIN) -> None:
        lines.extend(screen.wrapped(f"{name:<{NAMES}}{text}", style, " " * NAMES))

    total = report.kept + sum(report.dropped.values())
    noun = "record" if total == 1 else "records"
    schemas = " and ".join(f"{name} ({count:,})" for name, count in report.formats.items())
    say("data", f"{', '.join(settings.data.dataset_path)}: {total:,} {noun}, as {script} reads them", BOLD)
    if note:
        say("", note)
    say("schemas", schemas + (f", {report.bare}" if report.bare else ""))
    used = [f"{settings.keys.renamed[key]} as {key}" if key in settings.keys.renamed else key for key in report.used]
    say("keys", ", ".join(used))
    passed_over = list(map(dataset.shown, report.passed_over))
    passed_over += [f"{dataset.shown(key)} (--ignore_keys)" for key in settings.keys.ignore_keys]
    say("passed over", ", ".join(passed_over) or "none")
    say("kept", f"{report.kept:,}" + (f", {report.shortened:,} of them shortened" if report.shortened else ""))
    for reason, place in first_dropped(settings, report).items():
        say("dropped", f"{report.dropped[reason]:,} {reason}; the first is {short(place, settings)}")
    lengths = report.lengths
    about = f" (about: {lengths['estimated']:,} are estimated)" if lengths["estimated"] else ""
    say(
        "tokens",
        f"median {lengths['median']:,}, 95 % up to {lengths['percentile_95']:,}, longest {lengths['longest']:,}"
        f"{about}; {lengths['over']:,} over --max_length {settings.text.max_length}",
    )
    if report.typed_special:
        say("note", f"{report.typed_special:,} with strings of special tokens, which stay characters")
    for warning in report.warnings:
        say("warning", warning)
    return lines


def as_json(
    settings: Settings, script: str, examples: Examples, shown: Examples, places: list[str], report: Report,
    tokenizer: Tokenizer,
) -> dict:  # fmt: skip
    """What `facts` and the examples say, for programs."""
    first = first_dropped(settings, report)
    return {
        "files": list(settings.data.dataset_path),
        "script": script,
        "schemas": report.formats,
        "bare": report.bare,
        "used": list(report.used),
        "passed_over": list(report.passed_over),
        "kept": report.kept,
        "dropped": {reason: {"records": n, "first": first[reason]} for reason, n in report.dropped.items()},
        "shortened": report.shortened,
        "typed_special": report.typed_special,
        "tokens": report.lengths | {"max_length": settings.text.max_length},
        "warnings": list(report.warnings),
        "examples": [
            {"place": place} | example_as_json(example, tokenizer)
            for place, example in zip(places, shown, strict=True)
        ],
    }  # fmt: skip


def example_as_json(example: Example, tokenizer: Tokenizer) -> dict:
    """An example whole: its texts in parts, which are marked (they carry loss, or the reward is read there) or not."""
    texts = [
        {
            "name": text.name or "text",
            "grade": text.grade,
            "parts": [
                {"text": "".join(s for s, _ in tokenizer.decode(ids.tolist())), "ids": ids.tolist(), "marked": marked}
                for ids, marked in text.parts
            ],
        }
        for text in show.texts_of(example)
    ]
    labels = {name: getattr(example, name) for name in ("label", "margin", "weight", "strength")}
    known = [None if np.isnan(number) else float(number) for number in example.attributes]
    return {"texts": texts} | labels | ({"attributes": known} if known else {})


if __name__ == "__main__":
    cli.end_with_the_pipe()
    with cli.one_line_errors():
        settings = parse(Settings, __doc__, positional=POSITIONAL)
        with dist.session(0):
            main(settings)
