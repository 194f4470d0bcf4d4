"""What a run leaves behind and says: run.json, metrics.jsonl, and a progress bar or, in a log file, a line at a time.

Steps hand in sums on the device. They are brought to the host, summed over ranks and divided only when a line is due,
so that no step waits for logging. That is also when a loss that is not finite is found, and named by its step, before
anything is saved.
"""

import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rm import dist
from rm.config import REQUIRED, as_dict, require_positive, setting


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run"""

    output_dir: str = setting(REQUIRED, "new folder for the model, run.json and metrics.jsonl")
    seed: int = setting(0, "seed of the data order and of new weights")
    logging_steps: int = setting(10, "write a line of metrics every this many steps")
    eval_steps: int | None = setting(None, "evaluate every this many steps as well as at the end")

    def check(self) -> None:
        require_positive(self, "logging_steps")
        if self.eval_steps is not None:
            require_positive(self, "eval_steps")


def check_free(output_dir: str, names: tuple[str, ...] = ("run.json", "model")) -> None:
    """A run never writes over another, of which it would find these files. Every rank checks before any rank writes."""
    held = [name for name in names if (Path(output_dir) / name).exists()]
    if held:
        raise ValueError(
            f"--output_dir {output_dir} already holds another run ({held[0]}): name a new folder or delete that one"
        )
    dist.barrier()


class Run:
    """The record of one training run: `train` once a step, `evaluation` when it is due."""

    def __init__(self, settings: RunSettings, steps: int, steps_per_epoch: int, facts: dict):
        """`facts` go into run.json beside the settings and versions: data, whatever else identifies the run."""
        self.settings, self.steps, self.steps_per_epoch = settings, steps, steps_per_epoch
        self.folder = Path(settings.output_dir)
        self.window: list[tuple] = []  # (step, sums, examples, tokens) of each step since the last line
        self.since = time.perf_counter()
        self.metrics = None
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(json.dumps(provenance(settings) | facts, indent=2) + "\n")
            self.metrics = open(self.folder / "metrics.jsonl", "a")
        self.bar = tqdm(
            total=steps, unit="step", disable=not (dist.is_main() and sys.stderr.isatty()), dynamic_ncols=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    def train(
        self, step: int, sums: dict[str, Tensor], learning_rate: float, examples: int, tokens: int, unit: str
    ) -> None:
        """Take in one step's sums (`step` counts finished steps, from 1); write a line if one is due.

        Args:
            examples, tokens: of the step, over all ranks; `unit` is what the examples are called ("pairs").
        """
        self.window.append((step, sums, examples, tokens))
        self.bar.update()
        if step % self.settings.logging_steps and step != self.steps and not self.evaluates(step):
            return
        values = self._flush()
        seconds = time.perf_counter() - self.since
        done = {"tokens": sum(w[3] for w in self.window), unit: sum(w[2] for w in self.window)}
        line = self._at(step) | values | {"learning_rate": learning_rate}
        line |= {f"{name}_per_second": round(n / seconds, 2) for name, n in done.items()}
        self._write(line, left=seconds / len(self.window) * (self.steps - step))
        self.window, self.since = [], time.perf_counter()

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after `step`: every --eval_steps, and at the end."""
        return step == self.steps or bool(self.settings.eval_steps and step % self.settings.eval_steps == 0)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write the means of an evaluation; its time does not count as training time."""
        self._write(self._at(step) | {f"eval_{name}": value for name, value in values.items()})
        self.since = time.perf_counter()

    def _at(self, step: int) -> dict:
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _flush(self) -> dict[str, float]:
        """Means over the window and all ranks; raises if any of its steps was not finite."""
        names = list(self.window[0][1])
        table = torch.stack([torch.stack([sums[name].double() for name in names]) for _, sums, *_ in self.window])
        table[:, names.index("grad_norm")] /= dist.world()  # already global: every rank has the same
        steps = [dict(zip(names, row, strict=True)) for row in dist.sum_over_ranks(table).tolist()]
        for (step, *_), sums in zip(self.window, steps, strict=True):
            if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
                raise ValueError(
                    f"step {step}: the loss is {sums['loss'] / sums['count']}, the gradient norm {sums['grad_norm']}; "
                    f"stopped, nothing was saved after it. Try a lower --learning_rate or a longer --warmup_ratio"
                )
        count = sum(sums["count"] for sums in steps)
        means = {name: sum(sums[name] for sums in steps) / count for name in names if name != "count"}
        return means | {"grad_norm": steps[-1]["grad_norm"]}

    def _write(self, line: dict, left: float | None = None) -> None:
        if not self.metrics:
            return
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        said = "  ".join(f"{name} {_short(value)}" for name, value in line.items() if name not in ("step", "epoch"))
        if self.bar.disable or left is None:
            remaining = "" if left is None else f"  {tqdm.format_interval(left)} left"
            tqdm.write(f"step {line['step']}/{self.steps}  {said}{remaining}")
        else:
            self.bar.set_postfix_str(said)


def say(text: str) -> None:
    """A line on the terminal, from one process, without breaking the progress bar."""
    if dist.is_main():
        tqdm.write(text)


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
        "processes": dist.world(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": commit or None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
