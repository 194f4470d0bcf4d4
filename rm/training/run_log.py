"""What a run writes: run.json, metrics.jsonl and exit.json; `rm.training.progress` shows a part of it.

Steps hand in sums on the device. They are brought to the host, summed over ranks and divided only when a line is due,
so that no step waits for logging. That is also when a loss or gradient that is not finite is found, and named by its
step, before anything is saved.
"""

import contextlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rm.config import REQUIRED, SettingsGroup, as_saved, require_positive, setting
from rm.data.batch import StepBatches
from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.run_files import read_exit, read_run
from rm.terminal import warn, without_secrets, without_secrets_in
from rm.training import trackers
from rm.training.best import Best, BestSettings
from rm.training.metrics_file import MetricsFile
from rm.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class RunSettings(SettingsGroup):
    """Run"""

    output_dir: str = setting(
        REQUIRED,
        "folder for the model, checkpoints, run.json and metrics.jsonl: new, or of a previous run to resume",
        may_change=True,
    )
    seed: int = setting(0, "seed of the data order, of dropout and of new weights")
    logging_steps: int = setting(10, "write a line of metrics every this many steps", may_change=True)
    eval_steps: int | None = setting(None, "evaluate every this many steps, as well as at the end", may_change=True)
    eval_on_start: bool = setting(False, "also evaluate before the first step", may_change=True)
    report_to: str = setting(
        "none", "also send metrics to this tool, besides metrics.jsonl and metrics.csv", trackers.TOOLS, may_change=True
    )

    def check(self) -> None:
        require_positive(logging_steps=self.logging_steps, eval_steps=self.eval_steps)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, got {self.seed}")
        trackers.check_installed(self.report_to)


def check_unused(
    output_dir: str, names: tuple[str, ...] = ("run.json", "model", "report.json", "scores.jsonl")
) -> None:
    """Raise ValueError where a folder has one of these files of another run or evaluation.

    Checked on all ranks before any of them writes.
    """
    existing = [name for name in names if (Path(output_dir) / name).exists()]
    if existing:
        raise ValueError(
            f"--output_dir {output_dir} already holds another run ({existing[0]}): name a new folder or delete that one"
        )
    dist.barrier()


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or at a checkpoint's step."""

    step: int = 0
    unlogged_sums: tuple[dict, ...] = ()  # sums over all ranks of each step since the last line of metrics
    identity: dict = field(default_factory=dict)  # what a checkpoint to resume from has to agree in
    best: dict | None = None  # the checkpoint's `rm.training.best.Best.state`
    own: dict = field(default_factory=dict)  # the checkpoint's `rm.training.checkpointer.Checkpointer.own`


class RunLog:
    """The record of one training run: `log_step` after every step, `log_evaluation` when one is done.

    How it ended is written to exit.json: "finished", "stopped" (by a signal, `dist.Stopped`) or "failed". A run that
    was killed leaves none, nor does one that lost another process: it may be started again.
    """

    def __init__(
        self,
        settings: RunSettings,
        all_settings: SettingsGroup,
        steps: int,
        steps_per_epoch: int,
        facts: dict,
        start: Start = Start(),  # noqa: B008
        utilization: Callable[[float], float | None] = lambda tokens_per_second: None,
        best: BestSettings = BestSettings(),  # noqa: B008
    ):
        """
        Args:
            all_settings: the script's, for run.json.
            facts: go into run.json beside settings and versions: the data, whatever else identifies the run.
            utilization: of the devices (MFU) at a number of tokens per second; None where it is not known.
        """
        self.settings, self.steps, self.steps_per_epoch, self.start = settings, steps, steps_per_epoch, start
        self.utilization = utilization
        self.folder, self.step = Path(settings.output_dir), start.step
        self.window: list[dict] = []  # this rank's sums of each step since they were last brought to the host
        self.unlogged_sums = list(start.unlogged_sums)
        self.extra: dict[str, float] = {}  # values for the next line
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", start.step)
        self.best = Best(best, facts.get("data", {}).get("held_out"), start.best)
        if start.best and start.best.get("evaluated_step") is not None and not self.best.is_restored:
            dist.say("the held-out data has changed: which evaluation is best is decided anew")
        # An evaluation that the checkpoint does not know of is done again: nothing tells whether its line is undamaged.
        self.start_is_evaluated = self.best.evaluated_step == start.step and self.metrics.has_evaluation(start.step)
        if not self.start_is_evaluated:
            self.metrics.forget_evaluation(start.step)
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "exit.json").unlink(missing_ok=True)
            description = provenance(all_settings) | without_secrets_in(facts) | self._history()
            write_atomically(self.folder / "run.json", json.dumps(description, indent=2) + "\n")
            self.metrics.begin()
            self.tracker = trackers.tracker(settings.report_to, self.folder, start.step, as_saved(all_settings))
        self._begin_line()
        self.progress = Progress(steps, start.step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.progress.close()
        if kind is None:
            status = "finished"
        else:
            status = "stopped" if issubclass(kind, dist.Stopped) else "failed"
        if dist.is_main():
            if not dist.is_lost_process(error):
                self._write_end(status, error)
            self.tracker.close()  # last: a tracker's server may fail

    def _write_end(self, status: str, error: BaseException | None) -> None:
        self._flush_metrics(status)
        reason = str(error or "all steps are done")
        if error is None and self.stops_early:
            reason = f"stopped early: {self.best.settings.metric} was best at step {self.best.step}"
        with _reported("exit.json and metrics.csv"):
            mark_end(self.folder, status=status, step=self.step, steps=self.steps, reason=without_secrets(reason))
            trackers.write_csv(self.metrics.file)

    def _flush_metrics(self, status: str) -> None:
        """Write the lines that a full disk did not take: no line follows with which that would be tried again."""
        try:
            self.metrics.flush()
        except OSError as error:
            lines = f"{error}. These lines of metrics are not in {self.metrics.file}:\n{self.metrics.unwritten}"
            if status == "finished":  # of the other ends the reason is the error to report
                raise OSError(lines) from error
            warn(lines)

    def log_step(
        self,
        step: int,
        sums: dict[str, Tensor],
        grad_norm: Tensor,
        learning_rate: float,
        batches: StepBatches,
        unit: str,
    ) -> None:
        """Take in one step's sums; write a line if one is due.

        Args:
            step: finished steps, from 1.
            sums: of this rank.
            grad_norm: global, the same on every rank.
            batches: of the step; `unit` is what its examples are called ("pairs").
        """
        self.step = step
        self.window.append(sums | {"grad_norm": grad_norm.to(sums["loss"].device, non_blocking=True)})
        self.work_done += np.array([1, batches.num_tokens, batches.num_examples, batches.num_prompts or 0])
        self.progress.after_step()
        if step % self.settings.logging_steps and step != self.steps and not self.evaluation_due(step):
            return
        values = self._means()
        seconds = time.perf_counter() - self.line_began
        steps, tokens, examples, prompts = self.work_done.tolist()
        line = self._position(step) | values | {"learning_rate": learning_rate}
        line["tokens_per_second"] = round(tokens / seconds, 2)
        line[f"{unit}_per_second"] = round(examples / seconds, 2)
        if batches.num_prompts is not None:
            line |= {f"{unit}_per_step": round(examples / steps, 2), "prompts_per_step": round(prompts / steps, 2)}
        mfu = self.utilization(tokens / seconds)
        if mfu is not None:
            line["mfu"] = round(mfu, 4)
        line["peak_memory_gib"] = round(dist.peak_memory() / 2**30, 3)
        if dist.device().type == "cuda":  # with what the allocator holds and cannot use
            line["reserved_memory_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        line |= self.extra
        self._record(line)
        self.progress.show_metrics(step, line, seconds / steps)
        self.unlogged_sums = []
        self._begin_line()

    def add_to_next_line(self, **values: float) -> None:
        """Add values to the next training line; values of one name are summed until then."""
        for name, value in values.items():
            self.extra[name] = round(self.extra.get(name, 0.0) + value, 4)

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after `step`: every --eval_steps, and at the end, unless it has been done already."""
        if step == self.start.step and self.start_is_evaluated:
            return False
        if step == 0:
            return self.settings.eval_on_start
        return step == self.steps or (self.settings.eval_steps is not None and step % self.settings.eval_steps == 0)

    def log_evaluation(self, step: int, means: dict[str, dict[str, float]]) -> None:
        """Write the means of an evaluation; its time does not count as training time.

        Args:
            means: {name of the set: {metric: mean}}; UNNAMED is all sets together.
        """
        line = self._position(step)
        for set_name, values in means.items():
            prefix = "eval_" if set_name == UNNAMED else f"eval_{set_name}_"
            line |= {f"{prefix}{name}": value for name, value in values.items()}
        self._record(line)
        self.best.take(step, line)
        self.progress.show_evaluation(step, means, None if self.best.step is None else str(self.best))
        self.line_began = time.perf_counter()

    @property
    def stops_early(self) -> bool:
        """Whether the last evaluation ends the training (--early_stopping_patience)."""
        return self.best.stops and self.step < self.steps

    def note_model(self, step: int) -> None:
        """Write to run.json of which step the saved model is, and which evaluation was the best."""
        self.model_step = step
        if dist.is_main():
            best = {"metric": self.best.settings.metric, "step": self.best.step, "value": self.best.value}
            description = read_run(self.folder) | {"model_step": step, "best_evaluation": best}
            write_atomically(self.folder / "run.json", json.dumps(description, indent=2) + "\n")

    def collect(self) -> list[dict]:
        """The sums over all ranks of each step since the last line.

        Raises:
            ValueError: the loss or the gradient of one of these steps was not finite.
        """
        if self.window:
            names = list(self.window[0])
            table = torch.stack([torch.stack([sums[name].double() for name in names]) for sums in self.window])
            norms = table[:, names.index("grad_norm")].tolist()  # global already: not to be summed
            first = self.step - len(self.window) + 1
            for step, (norm, row) in enumerate(zip(norms, dist.sum_over_ranks(table).tolist(), strict=True), first):
                sums = dict(zip(names, row, strict=True)) | {"grad_norm": norm}
                self.unlogged_sums.append(sums)
                _check_finite(step, sums)
            self.window = []
        return self.unlogged_sums

    def _means(self) -> dict[str, float]:
        """Over the steps since the last line and all ranks."""
        steps = self.collect()
        count = sum(sums["count"] for sums in steps)
        names = [name for name in steps[0] if name not in ("count", "grad_norm")]
        means = {name: sum(sums[name] for sums in steps) / count for name in names}
        return means | {"grad_norm": steps[-1]["grad_norm"]}

    def _begin_line(self) -> None:
        self.extra, self.line_began = {}, time.perf_counter()
        self.work_done = np.zeros(4)  # steps, tokens, examples, prompts

    def _position(self, step: int) -> dict:
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _record(self, line: dict) -> None:
        """Write a line to metrics.jsonl and to the tracker."""
        if dist.is_main():
            self.metrics.write(line)
            self.tracker.write(line)

    def _history(self) -> dict:
        """For run.json: each start of this run, and the step from which it went on."""
        try:
            before = read_run(self.folder).get("starts") or []
        except (OSError, ValueError):  # damaged: it is written again
            before = []
        return {"starts": before + [{"step": self.start.step, "time": _now(), "processes": dist.world_size()}]}


@contextlib.contextmanager
def _reported(files: str) -> Iterator[None]:
    """Print an error of the disk, and go on: a run whose model is saved does not fail by it."""
    try:
        yield
    except OSError as error:
        warn(f"{files}: {error}; the same command writes what is missing")


def complete(folder: Path) -> None:
    """Write what a finished run lacks beside its model, since a disk was full or the power failed."""
    try:
        status = read_exit(folder).get("status")
    except ValueError:  # damaged
        status = None
    with _reported("exit.json and metrics.csv"):
        if status != "finished":
            mark_end(folder, status="finished", reason="found finished")
        if not (folder / "metrics.csv").exists() and (folder / "metrics.jsonl").exists():
            trackers.write_csv(folder / "metrics.jsonl")


def mark_end(folder: Path, **facts) -> None:
    """Write exit.json: how a run ended, and when."""
    write_atomically(folder / "exit.json", json.dumps(facts | {"time": _now()}) + "\n")


def _check_finite(step: int, sums: dict[str, float]) -> None:
    if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
        raise ValueError(
            f"step {step}: the loss is {sums['loss'] / sums['count']}, the gradient norm {sums['grad_norm']}; the "
            f"update was skipped, and the run stops without saving anything after it. Try a lower --learning_rate or a "
            f"longer --warmup_ratio"
        )


def provenance(settings: SettingsGroup) -> dict:
    """Everything that identifies a run later: command, settings, versions, device, commit."""
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    packages = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")
    return {
        "command": without_secrets_in(sys.argv),
        "settings": as_saved(settings),
        "processes": dist.world_size(),
        "device": dist.device_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": commit or None,
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
