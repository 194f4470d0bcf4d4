"""The page of a training run: its curves, drawn from metrics.jsonl.

python -m rm.report runs/rm        writes runs/rm/report.html; at any time, of a run that goes on too
"""

import json
import sys
from functools import partial
from pathlib import Path

from rm import cli
from rm.distributed import process_group as dist
from rm.files import read_json
from rm.report import figures, html

CURVES = [  # (title, axis, name in metrics.jsonl; of the held-out data it begins with eval_)
    ("Loss", "loss", "loss"),
    ("Accuracy", "accuracy", "accuracy"),
    ("Margin", "reward", "margin"),
    ("Learning rate", "learning rate", "learning_rate"),
    ("Gradient norm before clipping", "norm", "grad_norm"),
    ("Throughput", "tokens per second", "tokens_per_second"),
]


def write_for(folder: str | Path) -> None:
    """report.html at the end of a run, which never ends badly for want of it. All ranks call it."""
    if dist.is_main():
        try:
            dist.say(f"report: {write(folder)}")
        except Exception as error:  # whatever it is, the model is worth more
            dist.say(f"report.html was not written: {type(error).__name__}: {error}")
    dist.barrier()  # ranks leave together: one that is gone may abort those that still talk


def write(folder: str | Path) -> Path:
    """Read metrics.jsonl and run.json of a training run and write report.html beside them."""
    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no metrics: name the output_dir of a training run")
    out = folder / "report.html"
    out.write_text(training_page(str(folder), lines, read_json(folder / "run.json")), encoding="utf-8")
    return out


def read_metrics(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without a last one that is being written."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def training_page(name: str, lines: list[dict], run: dict) -> str:
    """The page: last values, curves, and what it takes to say which run this was."""
    drawn, last = [], {}
    for title, axis, metric in CURVES:
        both = {"training": _points(lines, metric), "held out": _points(lines, f"eval_{metric}")}
        found = {label: points for label, points in both.items() if points}
        if found:
            drawn.append(partial(figures.curves, title, axis, found))
    for line in lines:
        last |= {key: value for key, value in line.items() if isinstance(value, (int, float))}
    settings = run.get("settings", {})
    facts = [[key, json.dumps(value, ensure_ascii=False)] for key, value in settings.items()]
    about = [run.get("started"), run.get("device"), f"{run['processes']} processes" if "processes" in run else None]
    parts = [
        html.note(" · ".join(filter(None, about))),
        html.figures(*drawn),
        html.heading("Last values"),
        html.table(["metric", "value"], [*last.items()]),
        html.heading("Settings"),
        html.table(["setting", "value"], facts),
    ]
    return html.page(f"Training run {name}", parts)


def _points(lines: list[dict], name: str) -> tuple[list, list] | None:
    """(steps, values) of one metric. Of a step that was computed again after a resume, the later value."""
    values = {line["step"]: line[name] for line in lines if isinstance(line.get(name), (int, float))}
    return (sorted(values), [values[step] for step in sorted(values)]) if values else None


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with cli.one_line_errors():
        print(write(sys.argv[1]))
