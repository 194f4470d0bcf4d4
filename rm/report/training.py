"""The HTML report of a training run: its curves, drawn from metrics.jsonl.

The training scripts write it when a run ends, and the model card of a reward model (`rm.report.model_card`);
`python -m rm.report RUN` writes both at any time.
"""

import json
from functools import partial
from pathlib import Path

from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.report import figures, html, model_card
from rm.run_files import read_metrics, read_run

CURVES = [  # (title, label of the y axis, name in metrics.jsonl, which has the prefix eval_ for held-out data)
    ("Loss", "loss", "loss"),
    ("Accuracy", "accuracy", "accuracy"),
    ("Margin", "reward margin", "margin"),
    ("Reward of chosen replies", "mean reward", "reward_chosen"),
    ("Reward of rejected replies", "mean reward", "reward_rejected"),
    ("Perplexity", "perplexity", "perplexity"),
    ("Token accuracy", "share of tokens", "token_accuracy"),
    ("Learning rate", "learning rate", "learning_rate"),
    ("Gradient norm before clipping", "gradient norm", "grad_norm"),
    ("Throughput", "tokens per second", "tokens_per_second"),
]


def write_report(folder: str | Path, if_missing: bool = False) -> None:
    """Write report.html at the end of a run; an error is reported but never raised. All ranks must call it.

    Args:
        if_missing: write it only where there is none.
    """
    if dist.is_main() and not (if_missing and Path(folder, "report.html").exists()):
        try:
            dist.say(f"report: {write_training_report(folder)}")
            write_model_card(folder)
        except Exception as error:  # no error of the report may fail a run whose model is trained and saved
            dist.say(f"report.html was not written, or no model card: {type(error).__name__}: {error}")
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
    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no metrics; give the output_dir of a training run")
    out = folder / "report.html"
    write_atomically(out, training_page(str(folder), lines, read_run(folder)))
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


def training_page(name: str, lines: list[dict], run: dict) -> str:
    """The HTML page: curves, latest metrics and settings.

    Args:
        name: the run's name, for the title.
        lines: the content of metrics.jsonl.
        run: the content of run.json.
    """
    held_out_sets = run.get("data", {}).get("held_out", {}).get("sets", {})  # by name; "all" has none
    curves = []
    for title, y_label, metric in CURVES:
        points = {"training": _points(lines, metric), "held-out": _points(lines, f"eval_{metric}")}
        points |= {name: _points(lines, f"eval_{name}_{metric}") for name in held_out_sets}
        points = {label: values for label, values in points.items() if values}
        if points:
            curves.append(partial(figures.curves, title, y_label, points))
    latest = {}
    for line in lines:
        latest |= {key: value for key, value in line.items() if isinstance(value, (int, float))}
    settings = [[key, json.dumps(value, ensure_ascii=False)] for key, value in run.get("settings", {}).items()]
    subtitle = [run.get("started"), run.get("device")]
    if "processes" in run:
        subtitle.append(f"{run['processes']} processes")
    parts = [
        html.note(" · ".join(filter(None, subtitle))),
        html.figures(*curves),
        html.heading("Latest metrics"),
        html.table(["metric", "value"], [*latest.items()]),
        html.heading("Settings"),
        html.table(["setting", "value"], settings),
    ]
    return html.page(f"Training run {name}", parts)


def _points(lines: list[dict], name: str) -> tuple[list, list] | None:
    """(steps, values) of one metric, sorted by step; None if it was never logged."""
    # A run that resumes from a checkpoint logs some steps again: the later value replaces the earlier one.
    values = {line["step"]: line[name] for line in lines if isinstance(line.get(name), (int, float))}
    if not values:
        return None
    return sorted(values), [values[step] for step in sorted(values)]
