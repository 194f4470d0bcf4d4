"""Evaluate a reward model on preference pairs and rankings.

    python eval_rm.py --model_name_or_path runs/rm/model --dataset_path test.jsonl --output_dir runs/eval
    python eval_rm.py ... --dataset_path base=a.jsonl online=b.jsonl    two named sets
    python eval_rm.py ... --score_only true --best_of_n true                    rewards of any replies, and the best
    torchrun --nproc_per_node 8 eval_rm.py ...       the same numbers from eight GPUs

Writes report.json (accuracy with its 95 % intervals, calibration, accuracy by subset, turns and length; every number is
defined in docs/evaluation.md), scores.jsonl (one line a record, in file order, scores in the order of its replies) and
report.html, one page with figures and the worst mistakes.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rm import cli
from rm.config import REQUIRED, parse, setting
from rm.data import batch, dataset
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.evaluation.results import Result, named_sets
from rm.evaluation.results import report as evaluation_report
from rm.hf import build, hub
from rm.model import heads
from rm.report import evaluation
from rm.scoring import contract
from rm.scoring.score import all_rewards
from rm.training import run_log


@dataclass(frozen=True, kw_only=True)
class Settings(build.ModelSettings, dataset.DataSettings, batch.PackingSettings, sharding.ParallelSettings):
    dataset_path: tuple[str, ...] = setting(REQUIRED, "files, or NAME=FILE: files of one name are one set")
    baseline_model_name_or_path: str | None = setting(None, "another reward model, for a paired test on the same pairs")
    max_length: int | None = setting(None, "the longest text in tokens; none: as in training, else 512")
    overlong: str | None = setting(
        None, "leave out or shorten what is longer; none: as in training", ("filter", "truncate")
    )
    truncation_side: str | None = setting(None, "where to shorten; none: as in training", ("left", "right"))
    score_only: bool = setting(False, "write scores.jsonl alone: records may have any number of replies and no grades")
    best_of_n: bool = setting(False, "write best.jsonl as well: every record's highest scored reply")
    output_dir: str = setting(REQUIRED, "folder for report.json, report.html and scores.jsonl")


def main(settings: Settings) -> None:
    settings = hub.fetched(settings)
    run_log.check_unused(settings.output_dir, ("report.json", "run.json", "scores.jsonl"))
    sets = named_sets(settings.dataset_path)
    ours, counts = score_sets(settings, sets)
    theirs = {}
    if settings.baseline_model_name_or_path:
        theirs, _ = score_sets(replace(settings, model_name_or_path=settings.baseline_model_name_or_path), sets)
    if dist.is_main():
        write(settings, ours, theirs, counts)


def score_sets(settings: Settings, sets: dict[str, list[str]]) -> tuple[dict[str, Result], dict]:
    """(every set's rewards, what became of its records), on every rank."""
    settings, agreed = contract.settled(settings)
    text = contract.encoding(settings, agreed)
    kind = dataset.replies if settings.score_only else dataset.pairs
    read = {name: dataset.read_once(kind, paths, settings, text.tokenizer) for name, paths in sets.items()}
    for name, (_, counts) in read.items():
        dist.say(f"{name}: {counts}")
    model = build.load(heads.RewardModel, settings, train=False)
    build.check_ids(model, *(examples for examples, _ in read.values()))
    if agreed:
        dtype = sharding.compute_dtype(settings)
        contract.check(agreed, settings.model_name_or_path, text, dtype, partial(contract.score_examples, model))
    results = {}
    for name, (examples, _) in read.items():
        results[name] = Result(sets[name], examples, all_rewards(model, batch.EvalBatches(examples, settings)).numpy())
        results[name].check_finite()
    return results, {name: asdict(counts) for name, (_, counts) in read.items()}


def write(settings: Settings, ours: dict[str, Result], theirs: dict[str, Result], counts: dict) -> None:
    """All files, and the table on the terminal. Of the main process alone."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = ours.items()
    write_lines(folder / "scores.jsonl", ({"set": name} | line for name, result in results for line in result.lines()))
    if settings.best_of_n:
        write_lines(folder / "best.jsonl", ({"set": name} | line for name, result in results for line in result.best()))
    if settings.score_only:
        dist.say(f"scores: {folder / 'scores.jsonl'}")
        return
    report = evaluation_report(ours, theirs) | {"data": counts} | run_log.provenance(settings)
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = evaluation.evaluation_page(report, ours)
    (folder / "report.html").write_text(page, encoding="utf-8")
    dist.say(evaluation.terminal(report))
    dist.say(f"report: {folder / 'report.html'}")


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(seed=0):
            main(settings)
