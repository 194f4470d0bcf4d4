"""What a run leaves behind and says: run.json, metrics.jsonl, and a progress bar or, in a log file, a line at a time.

Steps hand in sums on the device. They are brought to the host, summed over ranks and divided only when a line is due,
so that no step waits for logging. That is also when a loss that is not finite is found, and named by its step, before
anything is saved.
"""

import contextlib
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rm.config import REQUIRED, as_dict, require_positive, setting
from rm.distributed import process_group as dist
from rm.files import read_json, replace
from rm.training import trackers
from rm.training.metrics_file import MetricsFile


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run"""

    output_dir: str = setting(
        REQUIRED,
        "folder for the model, checkpoints, run.json and metrics.jsonl: new, or of this very run, which then goes on",
        may_change=True,
    )
    seed: int = setting(0, "seed of the data order and of new weights")
    logging_steps: int = setting(10, "write a line of metrics every this many steps", may_change=True)
    eval_steps: int | None = setting(None, "evaluate every this many steps as well as at the end", may_change=True)
    report_to: str = setting("none", "where metrics go beside metrics.jsonl and .csv", trackers.TOOLS, may_change=True)

    def check(self) -> None:
        require_positive(self, "logging_steps")
        trackers.check_installed(self.report_to)
        if self.eval_steps is not None:
            require_positive(self, "eval_steps")


def check_unused(output_dir: str, names: tuple[str, ...] = ("run.json", "model")) -> None:
    """A run never writes over another, of which it would find these files. Every rank checks before any rank writes."""
    held = [name for name in names if (Path(output_dir) / name).exists()]
    if held:
        raise ValueError(
            f"--output_dir {output_dir} already holds another run ({held[0]}): name a new folder or delete that one"
        )
    dist.barrier()


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or at a checkpoint's step."""

    step: int = 0
    unlogged_sums: tuple[dict, ...] = ()  # the sums, over all ranks, of each step since the last line of metrics
    identity: dict = field(default_factory=dict)  # what a checkpoint to go on from has to agree in


class RunLog:
    """The record of one training run: `train` once a step, `evaluation` when it is due.

    How it ended is left in exit.json: "finished", "stopped" (told to, `dist.Stopped`) or "failed". A run that was
    killed leaves none, nor does one that lost a process: it did nothing wrong and may be started again.
    """

    def __init__(self, settings: RunSettings, steps: int, steps_per_epoch: int, facts: dict, start: Start = Start()):  # noqa: B008
        """`facts` go into run.json beside the settings and versions: data, whatever else identifies the run."""
        self.settings, self.steps, self.steps_per_epoch, self.start = settings, steps, steps_per_epoch, start
        self.folder, self.step = Path(settings.output_dir), start.step
        self.window: list[dict] = []  # this rank's sums of each step since they were last brought to the host
        self.unlogged_sums = list(start.unlogged_sums)
        self.noted: dict[str, float] = {}  # goes into the next line
        self.journal = MetricsFile(self.folder / "metrics.jsonl", start.step)
        self.evaluated = self.journal.has(start.step, "eval_")  # or was stopped before it could be
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "exit.json").unlink(missing_ok=True)
            described = provenance(settings) | facts | self._history()
            replace(self.folder / "run.json", json.dumps(described, indent=2) + "\n")
            self.journal.begin()
            self.tracker = trackers.tracker(settings.report_to, self.folder, start.step, as_dict(settings))
        self._begin_line()
        self.bar = tqdm(
            total=steps,
            initial=start.step,
            unit="step",
            disable=not (dist.is_main() and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        status = "finished" if kind is None else "stopped" if issubclass(kind, dist.Stopped) else "failed"
        ended = {"status": status, "step": self.step, "steps": self.steps, "reason": str(error or "all steps are done")}
        if dist.is_main():
            self.tracker.close()
            if dist.is_lost_process(error):
                return
            with contextlib.suppress(OSError):  # a full disk: the error that led here is the one to tell
                mark_end(self.folder, **ended)
                trackers.write_csv(self.journal.file)

    def train(
        self, step: int, sums: dict[str, Tensor], learning_rate: float, examples: int, tokens: int, unit: str
    ) -> None:
        """Take in one step's sums (`step` counts finished steps, from 1); write a line if one is due.

        Args:
            examples, tokens: of the step, over all ranks; `unit` is what the examples are called ("pairs").
        """
        self.step = step
        self.window.append(sums)
        self.work += np.array([1, tokens, examples])
        self.bar.update()
        if step % self.settings.logging_steps and step != self.steps and not self.evaluates(step):
            return
        values = self._means()
        seconds = time.perf_counter() - self.since
        trained, *work = self.work.tolist()
        line = self._at(step) | values | {"learning_rate": learning_rate}
        line |= {f"{name}_per_second": round(n / seconds, 2) for name, n in zip(("tokens", unit), work, strict=True)}
        line |= {"peak_memory_gib": round(dist.peak_memory() / 2**30, 3)}
        self._write(line | self.noted, left=seconds / trained * (self.steps - step))
        self.unlogged_sums = []
        self._begin_line()

    def note(self, **values: float) -> None:
        """Something to say with the next line of training; what is noted twice until then is added up."""
        for name, value in values.items():
            self.noted[name] = round(self.noted.get(name, 0.0) + value, 4)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step`: every --eval_steps, and at the end, unless it is there already."""
        due = step == self.steps or bool(self.settings.eval_steps and step % self.settings.eval_steps == 0)
        return due and step > 0 and not (step == self.start.step and self.evaluated)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write the means of an evaluation; its time does not count as training time."""
        self._write(self._at(step) | {f"eval_{name}": value for name, value in values.items()})
        self.since = time.perf_counter()

    def collect(self) -> list[dict]:
        """The sums, over all ranks, of each step since the last line; raises if any of these steps was not finite."""
        if self.window:
            names = list(self.window[0])
            table = torch.stack([torch.stack([sums[name].double() for name in names]) for sums in self.window])
            table[:, names.index("grad_norm")] /= dist.world_size()  # already global: every rank has the same
            first = self.step - len(self.window) + 1
            for step, row in enumerate(dist.sum_over_ranks(table).tolist(), first):
                self.unlogged_sums.append(dict(zip(names, row, strict=True)))
                _check_finite(step, self.unlogged_sums[-1])
            self.window = []
        return self.unlogged_sums

    def _means(self) -> dict[str, float]:
        """Of the steps since the last line, over all ranks."""
        steps = self.collect()
        count = sum(sums["count"] for sums in steps)
        means = {name: sum(sums[name] for sums in steps) / count for name in steps[0] if name != "count"}
        return means | {"grad_norm": steps[-1]["grad_norm"]}

    def _begin_line(self) -> None:
        self.noted, self.since, self.work = {}, time.perf_counter(), np.zeros(3)  # steps, tokens, examples

    def _at(self, step: int) -> dict:
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _write(self, line: dict, left: float | None = None) -> None:
        if not dist.is_main():
            return
        self.journal.write(line)
        self.tracker.write(line)
        said = "  ".join(f"{name} {_short(value)}" for name, value in line.items() if name not in ("step", "epoch"))
        if self.bar.disable or left is None:
            remaining = "" if left is None else f"  {tqdm.format_interval(left)} left"
            tqdm.write(f"step {line['step']}/{self.steps}  {said}{remaining}")
        else:
            self.bar.set_postfix_str(said)

    def _history(self) -> dict:
        """For run.json: each start of this run, the first one and from which step it went on."""
        try:
            before = read_json(self.folder / "run.json")["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            before = []
        return {"starts": before + [{"step": self.start.step, "time": _now(), "processes": dist.world_size()}]}


def mark_end(folder: Path, **ended) -> None:
    """exit.json: how a run ended, and when."""
    replace(folder / "exit.json", json.dumps(ended | {"time": _now()}) + "\n")


def _check_finite(step: int, sums: dict[str, float]) -> None:
    if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
        raise ValueError(
            f"step {step}: the loss is {sums['loss'] / sums['count']}, the gradient norm {sums['grad_norm']}; "
            f"stopped, nothing was saved after it. Try a lower --learning_rate or a longer --warmup_ratio"
        )


def provenance(settings) -> dict:
    """What it takes to say later what this run was."""
    try:
        where = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    packages = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")
    return {
        "command": sys.argv,
        "settings": as_dict(settings),
        "processes": dist.world_size(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": commit or None,
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
