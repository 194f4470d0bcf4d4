"""The HTML report of a training run, or of several side by side: all that metrics.jsonl has, drawn over the steps.

The training scripts write it when a run ends, and the model card of a reward model (`rm.report.model_card`);
`python -m rm.report RUN` writes both at any time.
"""

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.report import figures, html, model_card
from rm.run_files import read_metrics, read_run

TITLES = {  # name in metrics.jsonl, which has the prefix eval_ for held-out data -> (title, label of the y axis)
    "loss": ("Loss", "loss"),
    "accuracy": ("Accuracy", "accuracy"),
    "margin": ("Margin", "reward margin"),
    "reward_chosen": ("Reward of chosen replies", "mean reward"),
    "reward_rejected": ("Reward of rejected replies", "mean reward"),
    "perplexity": ("Perplexity", "perplexity"),
    "token_accuracy": ("Token accuracy", "share of tokens"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm before clipping", "gradient norm"),
    "tokens_per_second": ("Throughput", "tokens per second"),
}
NOT_DRAWN = ("step", "epoch")  # nor the bounds of intervals
COMPARISON = "comparison.html"
STYLES = ("--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (2, 2)))  # of a run's named sets, then again


@dataclass(frozen=True)
class Run:
    """What a training run has written so far."""

    name: str
    lines: list[dict]  # of metrics.jsonl
    description: dict  # run.json

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError if the folder has no metrics."""
        lines = read_metrics(folder / "metrics.jsonl")
        if not lines:
            raise ValueError(f"{folder / 'metrics.jsonl'} holds no metrics; give the output_dir of a training run")
        return cls(str(folder), lines, read_run(folder))

    @property
    def settings(self) -> dict:
        return self.description.get("settings", {})

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of each metric."""
        return {key: value for line in self.lines for key, value in line.items() if isinstance(value, (int, float))}

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, once the run has ended."""
        return self.description.get("best_evaluation", {}).get("step")

    @property
    def held_out_sets(self) -> list[str]:
        """Their names; all of them together have none."""
        return [name for name in self.description.get("data", {}).get("held_out", {}).get("sets", {}) if name != "all"]

    def metrics(self) -> list[str]:
        """The names of what is drawn, without the prefixes of held-out data: those that have a title first."""
        latest, prefixes = self.latest, ["", "eval_", *(f"eval_{name}_" for name in self.held_out_sets)]

        def metric(name: str) -> str:
            # The name of a set may begin with another's, or as a metric does: it is the metric that most sets have.
            ends = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
            return max(ends, key=lambda end: (sum(prefix + end in latest for prefix in prefixes), -len(end)))

        names = dict.fromkeys(map(metric, latest))
        return [*(name for name in TITLES if name in names), *(name for name in names if name not in TITLES)]

    def points(self, name: str) -> tuple[list, list]:
        """(steps, values) of one metric, sorted by step."""
        # A run that resumes from a checkpoint logs some steps again: the later value replaces the earlier one.
        values = {line["step"]: line[name] for line in self.lines if isinstance(line.get(name), (int, float))}
        return sorted(values), [values[step] for step in sorted(values)]


def write_report(folder: str | Path, if_missing: bool = False) -> None:
    """Write report.html and the model card at the end of a run; an error is reported, never raised. All ranks call it.

    Args:
        if_missing: write only what is missing.
    """
    if dist.is_main():
        folder = Path(folder)
        files = {
            folder / "report.html": write_training_report,
            folder / "model" / model_card.FILE: write_model_card,
        }
        for file, write in files.items():
            if if_missing and file.exists():
                continue
            try:
                written = write(folder)  # None: no reward model, no card
                if written is not None:
                    dist.say(f"wrote {written}")
            except Exception as error:  # no error of a report may fail a run whose model is trained and saved
                dist.say(f"{file} was not written: {type(error).__name__}: {error}")
    # All ranks leave together: if one process exits early, those that still communicate may abort.
    dist.barrier()


def write_training_report(folder: str | Path) -> Path:
    """Write report.html into the output folder of a training run.

    Reads metrics.jsonl and run.json of that folder.

    Returns:
        The path of report.html.

    Raises:
        ValueError: if the folder has no metrics.
    """
    run = Run.read(Path(folder))
    out = Path(folder) / "report.html"
    write_atomically(out, training_page(run))
    return out


def write_comparison(folders: list[str]) -> Path:
    """Write comparison.html, of several training runs, into the output folder of the first one.

    Raises:
        ValueError: if one of the folders has no metrics.
    """
    runs, paths = [Run.read(Path(folder)) for folder in folders], [Path(folder).absolute() for folder in folders]
    top = os.path.commonpath([path.parent for path in paths])
    runs = [replace(run, name=os.path.relpath(path, top)) for run, path in zip(runs, paths, strict=True)]
    out = Path(folders[0]) / COMPARISON
    write_atomically(out, comparison_page(runs, top))
    return out


def write_model_card(folder: str | Path, evaluation: str | Path | None = None) -> Path | None:
    """Write model/README.md in the output folder of a training run; None where it holds no reward model.

    Args:
        evaluation: output folder of an evaluation of that model, whose numbers go into the card.
    """
    folder = Path(folder)
    if not (folder / "model" / "scoring.json").is_file():
        return None
    text = model_card.of_training(folder, None if evaluation is None else Path(evaluation))
    return model_card.write(folder / "model", text)


def training_page(run: Run) -> str:
    """The HTML page of a run: curves, latest metrics and settings."""
    colours = itertools.cycle(figures.COLOURS)
    sources = {"training": "", "held-out": "eval_"}
    sources |= {f"held-out: {name}": f"eval_{name}_" for name in run.held_out_sets}
    curves = [
        (label, run, prefix, "-", colour) for (label, prefix), colour in zip(sources.items(), colours, strict=False)
    ]
    subtitle = [run.description.get("started"), run.description.get("device")]
    if processes := run.description.get("processes"):
        subtitle.append(f"{processes} process{'es' if processes > 1 else ''}")
    if run.best_step is not None:
        subtitle.append(f"circle: step {run.best_step}, the best evaluation")
    parts = [
        html.note(" · ".join(filter(None, subtitle))),
        _figures(run.metrics(), curves),
        html.heading("Latest metrics"),
        html.table(["metric", "value"], [*run.latest.items()]),
        html.heading("Settings"),
        html.table(["setting", "value"], [[name, _as_json(value)] for name, value in run.settings.items()]),
    ]
    return html.page(f"Training run {run.name}", parts)


def comparison_page(runs: list[Run], top: str) -> str:
    """The HTML page of several runs: their curves in one figure, and the settings in which they differ.

    Args:
        top: the folder that all are in, below which are their names.
    """
    names = [run.name for run in runs]
    curves = []
    for run, colour in zip(runs, itertools.cycle(figures.COLOURS), strict=False):
        curves.append((run.name, run, "", ":", colour))
        curves.append((f"{run.name}, held-out", run, "eval_", "-", colour))
        curves += [
            (f"{run.name}, held-out: {name}", run, f"eval_{name}_", style, colour)
            for name, style in zip(run.held_out_sets, itertools.cycle(STYLES), strict=False)
        ]
    metrics = dict.fromkeys(name for run in runs for name in run.metrics())
    settings = [
        [name, *(_as_json(run.settings.get(name)) for run in runs)]
        for name in dict.fromkeys(name for run in runs for name in run.settings)
    ]
    latest = {name: [run.latest.get(name) for run in runs] for name in dict.fromkeys(n for r in runs for n in r.latest)}
    parts = [
        html.note(f"In {top}. Dotted: training. Circles: each run's best evaluation."),
        _figures(metrics, curves),
        html.heading("Latest metrics"),
        html.table(["metric", *names], [[name, *values] for name, values in latest.items()]),
        html.heading("Settings that differ"),
        html.table(["setting", *names], [row for row in settings if len(set(row[1:])) > 1]),
    ]
    return html.page("Training runs", parts)


def _figures(metrics: Iterable[str], curves: list[tuple[str, Run, str, str, str]]) -> str:
    """A figure for each metric.

    Args:
        curves: (label, run, prefix of the metric's name, style, colour).
    """
    drawn = []
    for metric in metrics:
        if metric in NOT_DRAWN or "_ci95_" in metric:
            continue
        lines = {}
        for label, run, prefix, style, colour in curves:
            steps, values = run.points(prefix + metric)
            if steps:
                marked = run.best_step if prefix else None
                lines[label] = figures.Curve(steps, values, colour, style, marked)
        title, y_label = TITLES.get(metric, (metric, metric))
        drawn.append(partial(figures.curves, title, y_label, lines))
    return html.figures(*drawn)


def _as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)
