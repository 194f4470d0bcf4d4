"""Evaluate a reward model on preference pairs and rankings.

    python eval_rm.py --model_name_or_path runs/rm/model --dataset_path test.jsonl --output_dir runs/eval
    python eval_rm.py ... --dataset_path base=a.jsonl online=b.jsonl    two named sets
    python eval_rm.py ... --model_name_or_path A B C                    the mean of three models' rewards
    python eval_rm.py ... --score_only true --best_of_n true            rewards of any replies, and the best reply
    torchrun --nproc_per_node 8 eval_rm.py ...       the same numbers from eight GPUs

Writes report.json (accuracy with its 95 % intervals, calibration, accuracy by subset, turns and length; every number is
defined in docs/evaluation.md), scores.jsonl (one line for each record, in file order, scores in the order of its
replies) and report.html, a page with figures and the worst mistakes.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rm import cli
from rm.config import REQUIRED, SettingsGroup, flatten, parse, setting
from rm.data.batch import EvalBatches, PackingSettings, new_texts
from rm.data.dataset import DataSettings, read_cached, say_report
from rm.data.encode import Task
from rm.data.reader import KeySettings
from rm.data.sets import named_sets
from rm.distributed import lease, sharding
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.evaluation.results import Result, ensemble, evaluation_report
from rm.files import read_json, temporary_name, write_together
from rm.hf import build, hub
from rm.hf.build import HeadSettings
from rm.model.heads import RewardModel
from rm.report.evaluation import evaluation_page, terminal_table
from rm.run_files import read_evaluation
from rm.scoring import contract
from rm.scoring.score import rewards_of_each
from rm.scoring.settings import ScoringTextSettings
from rm.training.run_log import check_unused, provenance
from rm.training.summary import say_what_runs


@dataclass(frozen=True, kw_only=True)
class ModelsSettings(HeadSettings):
    """Models"""

    model_name_or_path: tuple[str, ...] = setting(
        REQUIRED, "reward model: folder or hub id, org/name or org/name@revision; of several, rewards are averaged",
        hub="model",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(SettingsGroup):
    """Evaluation"""

    output_dir: str = setting(REQUIRED, "folder for report.json, report.html and scores.jsonl")
    baseline_model_name_or_path: str | None = setting(
        None, "another reward model, for a paired test on the same pairs", hub="model"
    )
    score_only: bool = setting(False, "write scores.jsonl only: records may have any number of replies and no grades")
    center_rewards: bool = setting(
        False, "subtract scoring.json's reward_mean, by which rewards are 0 on average over the set that it names"
    )
    best_of_n: bool = setting(False, "also write best.jsonl: every record's highest scored reply")


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """Settings of an evaluation"""

    models: ModelsSettings
    data: DataSettings
    keys: KeySettings
    evaluation: EvaluationSettings
    text: ScoringTextSettings
    packing: PackingSettings
    parallel: ParallelSettings


def main(settings: Settings) -> None:
    settings = hub.fetched(settings, named=True)
    evaluation = settings.evaluation
    check_folder(settings)
    sets = named_sets(settings.data.dataset_path)
    scored = [score_sets(settings, path, sets) for path in settings.models.model_name_or_path]
    results = scored[0].results if len(scored) == 1 else averaged(scored)
    baseline = {}
    if evaluation.baseline_model_name_or_path:
        baseline = score_sets(settings, evaluation.baseline_model_name_or_path, sets).results
    if dist.is_main():
        write(settings, results, baseline, scored[0].counts)


@dataclass(frozen=True)
class Scored:
    """What one model makes of all sets."""

    results: dict[str, Result]
    counts: dict[str, dict]  # what became of the records
    scale: tuple[float, float] | None  # mean and standard deviation of its rewards here, by what its contract states


def score_sets(settings: Settings, model_path: str, sets: dict[str, list[str]]) -> Scored:
    """The rewards of every set, on every rank."""
    text, agreed = contract.resolve(model_path, settings.text)
    mean = contract.mean_reward(model_path) if settings.evaluation.center_rewards else 0.0
    encoder = contract.text_encoder(model_path, text, agreed)
    task = Task.SCORING if settings.evaluation.score_only else Task.PREFERENCE
    examples, counts, dropped = {}, {}, {}
    for name, paths in sets.items():
        examples[name], report = read_cached(
            task, paths, text, encoder.tokenizer, settings.data.cache_dir, encoder.padding_id, settings.keys
        )
        counts[name], dropped[name] = report.facts, report.reasons
        say_report(name, report)
    label = settings.models.reward_label if model_path in settings.models.model_name_or_path else None
    model = build.build(RewardModel, model_path, settings.parallel, max_length=text.max_length, reward_label=label)
    build.check_data(model, text.max_length, *examples.values())
    build.load(model, model_path)
    say_what_runs(model)
    if agreed:
        score = partial(contract.score_examples, model)
        contract.verify(agreed, model_path, encoder, model.compute_dtype, score)
    results, seen, rewards = {}, {}, np.zeros(0, np.float32)  # of the texts that were seen, in that order
    for name, paths in sets.items():
        new, index = new_texts(examples[name], settings.packing, seen)
        rewards = np.append(rewards, rewards_of_each(model, EvalBatches(new, settings.packing)).numpy())
        own = rewards[index] - np.float32(mean)
        results[name] = Result(paths, examples[name], own, settings.keys, dropped[name])
        results[name].check_finite()
    sharding.release(model)  # for the next one
    scale = None if agreed is None or not agreed.reward_std else (agreed.reward_mean - mean, agreed.reward_std)
    return Scored(results, counts, scale)


def averaged(scored: list[Scored]) -> dict[str, Result]:
    """The mean of several models' rewards, for every set."""
    scales = [one.scale for one in scored]
    if None in scales:
        dist.say("a model states no mean and deviation of its rewards: the mean is of rewards as they are")
    results = {}
    for name, first in scored[0].results.items():
        results[name] = ensemble([one.results[name] for one in scored], scales)
        kept, of_first = len(results[name].examples), len(first.examples)
        if kept < of_first:
            dist.say(f"{name}: {kept:,} records are scored by all models, of {of_first:,} that the first one scored")
    return results


def check_folder(settings: Settings) -> None:
    """Raise ValueError where --output_dir holds anything but an evaluation by the same command, which is replaced."""
    folder = Path(settings.evaluation.output_dir)
    earlier = read_evaluation(folder)
    with contextlib.suppress(ValueError):  # killed while this was written: no file has its name yet
        earlier = earlier or read_json(temporary_name(folder / "report.json"))  # killed while the files got their names
    check_unused(str(folder), ("run.json",) if earlier else ("run.json", "scores.jsonl"))
    if not earlier:
        return
    before, now = earlier.get("settings"), json.loads(json.dumps(flatten(settings)))
    before = before if isinstance(before, dict) else {}
    changed = [name for name in now if before.get(name) != now[name] and name not in ("output_dir", "cache_dir")]
    if changed:
        listed = "; ".join(f"{name}: then {before.get(name)}, now {now[name]}" for name in changed)
        raise ValueError(
            f"--output_dir {folder} already holds another evaluation (report.json): {listed}. Name a new folder or "
            f"delete that one"
        )


def write(settings: Settings, results: dict[str, Result], baseline: dict[str, Result], counts: dict) -> None:
    """Write all files or none, and print the table. Only the main process calls it."""
    folder = Path(settings.evaluation.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    if settings.evaluation.best_of_n:
        files[folder / "best.jsonl"] = as_lines({"set": n} | line for n, r in results.items() for line in r.best())
    for file, of_model in (("baseline_scores.jsonl", baseline), ("scores.jsonl", results)):
        if of_model:
            files[folder / file] = all_lines(of_model)
    if settings.evaluation.score_only:
        write_together(files)
        dist.say(f"scores: {folder / 'scores.jsonl'}")
        return
    report = evaluation_report(results, baseline) | {"data": counts} | provenance(settings)
    files[folder / "report.html"] = [evaluation_page(report, results)]
    files[folder / "report.json"] = [json.dumps(report, indent=2, allow_nan=False) + "\n"]  # last: all are there
    write_together(files)
    for line in terminal_table(report):
        dist.say(line)
    dist.say(f"report: {folder / 'report.html'}")


def all_lines(results: dict[str, Result]) -> Iterator[str]:
    """The lines of scores.jsonl."""
    return as_lines({"set": name} | line for name, result in results.items() for line in result.lines())


def as_lines(values: Iterable[dict]) -> Iterator[str]:
    return (json.dumps(value, ensure_ascii=False) + "\n" for value in values)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(seed=0), lease.held(settings.evaluation.output_dir):
            main(settings)
