"""Evaluate a reward model on preference pairs and rankings.

    python eval_rm.py --model_name_or_path runs/rm/model --dataset_path test.jsonl --output_dir runs/eval
    python eval_rm.py ... --dataset_path base=a.jsonl online=b.jsonl    two named sets
    python eval_rm.py ... --model_name_or_path A B C                    the mean of three models' rewards
    python eval_rm.py ... --score_only true --best_of_n true            rewards of any replies, and the best reply
    python eval_rm.py ... --attributes helpfulness verbosity            errors of a model of --loss regression
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
from rm.config import REQUIRED, SettingsGroup, as_saved, parse, setting
from rm.data.batch import EvalBatches, PackingSettings, new_texts
from rm.data.dataset import DataSettings, Report, read_cached, say_report
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.reader import KeySettings
from rm.data.sets import named_sets
from rm.distributed import lease, sharding
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.evaluation.attributes import Predictions
from rm.evaluation.results import Result, ensemble, evaluation_report
from rm.files import read_json, temporary_name, write_together
from rm.hf import build, hub, outputs
from rm.hf.outputs import HeadSettings
from rm.model.heads import reward_model
from rm.model.losses import LossSettings
from rm.report import html
from rm.report.evaluation import attribute_table, evaluation_page, terminal_table
from rm.run_files import read_evaluation
from rm.scoring import contract
from rm.scoring.contract_file import Contract
from rm.scoring.score import rewards_of_each
from rm.scoring.settings import ScoringTextSettings
from rm.training.run_log import check_unused, provenance
from rm.training.summary import say_what_runs

# What may be written besides report.json, which says whose they are.
FILES = ("best.jsonl", "baseline_scores.jsonl", "scores.jsonl", "report.html")


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
    score_only: bool = setting(
        False, "score replies without comparing them: records may have any number of replies and no grades"
    )
    center_rewards: bool = setting(
        False, "subtract scoring.json's reward_mean, by which rewards are 0 on average over the set that it names"
    )
    best_of_n: bool = setting(False, "also write best.jsonl: every record's highest scored reply")
    attributes: tuple[str, ...] = setting(
        (), "of a head with several outputs, compare these with the numbers that records give to single replies"
    )

    def check(self) -> None:
        of_pairs = ("baseline_model_name_or_path", "score_only", "center_rewards", "best_of_n")
        if self.attributes and (given := [name for name in of_pairs if getattr(self, name)]):
            raise ValueError(f"--{given[0]} compares replies, and --attributes does not: leave one of them out")


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

    def check(self) -> None:
        if self.evaluation.attributes and (self.models.chooses or len(self.models.model_name_or_path) > 1):
            raise ValueError("--attributes reads all outputs of one model: leave out other models and --reward_label")


def main(settings: Settings) -> None:
    settings = hub.fetched(settings, named=True)
    evaluation = settings.evaluation
    check_folder(settings)
    sets = named_sets(settings.data.dataset_path)
    if evaluation.attributes:
        return evaluate_attributes(settings, sets)
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
    mean = contract.mean_reward(model_path) if settings.evaluation.center_rewards else 0.0
    task = Task.SCORING if settings.evaluation.score_only else Task.PREFERENCE
    head = settings.models if model_path in settings.models.model_name_or_path else HeadSettings()
    examples, reports, rewards, agreed = read_and_score(settings, model_path, sets, task, head)
    results = {}
    for name, paths in sets.items():
        own = rewards[name] - np.float32(mean)
        results[name] = Result(paths, examples[name], own, settings.keys, reports[name].reasons)
        results[name].check_finite()
    scale = None if agreed is None or not agreed.reward_std else (agreed.reward_mean - mean, agreed.reward_std)
    return Scored(results, {name: report.facts for name, report in reports.items()}, scale)


def read_and_score(
    settings: Settings,
    model_path: str,
    sets: dict[str, list[str]],
    task: Task,
    head: HeadSettings,
    labels: tuple[str, ...] = (),
) -> tuple[dict[str, Examples], dict[str, Report], dict[str, np.ndarray], Contract | None]:
    """(examples, what became of the records, rewards of the replies in order, all by set; the model's contract)

    Args:
        labels: of all outputs of the model, which are given in place of rewards: (R, A).
    """
    text, agreed = contract.resolve(model_path, settings.text)
    encoder = contract.text_encoder(model_path, text, agreed)
    examples, reports, rewards = {}, {}, {}
    for name, paths in sets.items():
        examples[name], reports[name] = read_cached(
            task, paths, text, encoder.tokenizer, settings.data.cache_dir, encoder.padding_id, settings.keys,
            attributes=settings.evaluation.attributes,
        )  # fmt: skip
        say_report(name, reports[name])
    loss = LossSettings.of_outputs(labels)
    model = build.build(
        reward_model(loss), model_path, settings.parallel, loss=loss, max_length=text.max_length, head=head
    )
    build.check_data(model, text.max_length, *examples.values())
    build.load(model, model_path)
    say_what_runs(model)
    if agreed:
        score = partial(contract.score_examples, model)
        agreed = agreed.of_output(model.reward_output)
        contract.verify(agreed, model_path, encoder, model.compute_dtype, score)
    seen, of_texts = {}, []  # the texts that were scored, and their rewards, in that order
    for name in sets:
        new, index = new_texts(examples[name], settings.packing, seen)
        of_texts.append(rewards_of_each(model, EvalBatches(new, settings.packing)).numpy())
        rewards[name] = np.concatenate([part for part in of_texts if len(part)])[index]
    sharding.release(model)  # for the next one
    return examples, reports, rewards, agreed


def evaluate_attributes(settings: Settings, sets: dict[str, list[str]]) -> None:
    """Write how well a model's outputs predict the numbers of records: report.json and scores.jsonl."""
    (model_path,), names = settings.models.model_name_or_path, settings.evaluation.attributes
    labels = outputs.names_of(model_path)
    if unknown := [name for name in names if name not in labels]:
        raise ValueError(
            f"--attributes {unknown[0]}: the outputs of {model_path} are {', '.join(labels) or 'not named'}"
        )
    examples, reports, scores, _ = read_and_score(settings, model_path, sets, Task.REGRESSION, HeadSettings(), labels)
    if broken := [name for name in sets if not np.isfinite(scores[name]).all()]:
        raise ValueError(
            f"{broken[0]}: outputs are not finite numbers; check that the checkpoint is complete and undamaged, or try "
            f"--dtype float32"
        )
    columns = [labels.index(name) for name in names]
    of_sets = {n: Predictions(names, scores[n][:, columns], np.asarray(examples[n].attributes)) for n in sets}
    if not dist.is_main():
        return
    counts = {name: report.facts for name, report in reports.items()}
    report = {"sets": {name: one.report for name, one in of_sets.items()}, "data": counts} | provenance(settings)
    folder = Path(settings.evaluation.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ({"set": n} | line for n in sets for line in of_sets[n].lines(examples[n].record, reports[n].reasons))
    write_together({
        folder / "scores.jsonl": as_lines(lines),
        folder / "report.json": [json.dumps(report, indent=2, allow_nan=False) + "\n"],
    })  # fmt: skip
    for line in html.text_table(*attribute_table(report)):
        dist.say(line)


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
    check_unused(str(folder), ("run.json",) if earlier else ("run.json", *FILES))
    if not earlier:
        return
    before, now = earlier.get("settings"), as_saved(settings)
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
    facts, is_compared = {"data": counts} | provenance(settings), not settings.evaluation.score_only
    report = (evaluation_report(results, baseline) if is_compared else {"sets": {}}) | facts
    if is_compared:
        files[folder / "report.html"] = [evaluation_page(report, results)]
    files[folder / "report.json"] = [json.dumps(report, indent=2, allow_nan=False) + "\n"]  # last: all are there
    write_together(files)
    for line in terminal_table(report) if is_compared else ():
        dist.say(line)
    dist.say(f"report: {folder / 'report.html'}" if is_compared else f"scores: {folder / 'scores.jsonl'}")


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
