"""When a run saves, and how it leaves when it is told to.

A checkpoint is copied to host memory between two steps and written by a thread while training goes on. The threads
use no collectives. That all have written, that one has failed and that somebody was told to stop are three numbers
which the ranks add up once a step (`dist.LateSum`), so that every rank acts on them at the same step.
"""

import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from rm.model import lora
from rm.training import run_log
from rm.training.signals import FIRST_STEP, Watchdog

LAST_SAVE = 10  # times the patience of the watchdog, as FIRST_STEP is


class Checkpointer:
    """Saves when it is due and when the run is told to stop: `after` every step, `poll` between rows of an evaluation.

    A stop is raised as `dist.Stopped`; on its way out of the `with` block the step's checkpoint is written.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, run: run_log.RunLog):
        self.model, self.optimizer, self.run, self.settings = model, optimizer, run, run.settings
        self.folder = run.folder / "checkpoints"
        self.watch = Watchdog(self.settings.stall_timeout)
        self.sums = dist.AsyncSum()
        self.saved = run.start.step  # the step of the newest checkpoint
        self.writing: _Writing | None = None  # on all ranks or on none
        self.failures = 0  # in a row

    def __enter__(self):
        if dist.is_main():
            for left in self.folder.glob(".step_*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        # A number that no earlier process of this run has: one that lives on must not write among our files.
        stamp = torch.tensor(time.time_ns() if dist.is_main() else 0)
        self.attempt = f"{int(dist.sum_over_ranks(stamp)):x}"
        self.watch.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._finish()
            elif issubclass(kind, dist.Stopped):
                self._save_and_leave()
        finally:
            self.watch.__exit__(kind, error, trace)

    def after(self, step: int) -> None:
        """To be called when `step` steps are done."""
        if self.settings.save_steps and step % self.settings.save_steps == 0:
            self._save()
        self.poll()
        if step == self.run.steps:
            self._finish()

    def poll(self) -> None:
        """Act on what the ranks have told each other. Raises Stopped if one of them was told to stop."""
        if self.run.step == self.run.steps:
            self.watch.beat(LAST_SAVE)  # after the last evaluation the model is exported, on whatever disk
        else:
            self.watch.beat(FIRST_STEP if self.run.step == self.run.start.step else 1)
        told = self.sums.take()
        stop = told and self._act(*told)
        if self.failures == 2:
            raise ValueError(f"two checkpoints in a row could not be written; the newest is of step {self.saved}")
        if stop:
            raise dist.Stopped(self.watch.asked or "told to stop", self.watch.number)
        self._tell()

    def _tell(self) -> None:
        writing = self.writing
        self.sums.send(bool(self.watch.asked), bool(writing and writing.done), bool(writing and writing.error))

    def _act(self, stop: float, written: float, failed: float) -> bool:
        """The same on every rank."""
        if failed:
            self._give_up()
        elif self.writing and written == dist.world_size():
            self._publish()
        return stop > 0

    def _save(self) -> None:
        """Copy the training state and begin to write it."""
        began = time.perf_counter()
        self._finish()
        unlogged_sums = self.run.collect()  # raises if a step was not finite: nothing bad is ever saved
        state = {"step": self.run.step, "unsaid": list(unlogged_sums), "identity": self.run.start.identity}
        folder = self.folder / f".step_{self.run.step}.{self.attempt}"
        self.writing = _Writing(folder, state, checkpoint.snapshot(lora.checkpointed(self.model), self.optimizer))
        self.run.note(checkpoint_blocked_seconds=time.perf_counter() - began)

    def _finish(self) -> None:
        """Wait until what is being written is there, or given up."""
        if self.writing:
            self.writing.thread.join()
            self.sums.take()
            self._tell()
            self._act(*self.sums.take())

    def _publish(self) -> None:
        writing = self.writing
        began = time.perf_counter()
        if dist.is_main():
            try:
                final = self.folder / f"step_{writing.state['step']}"
                checkpoint.publish(writing.folder, final, writing.state, writing.taken)
                self._prune(final)
            except (OSError, ValueError) as error:
                writing.error = error
        if dist.any_rank(writing.error is not None):
            self._give_up()
            return
        self.saved, self.writing, self.failures = writing.state["step"], None, 0
        self.run.note(checkpoint_seconds=writing.seconds, checkpoint_blocked_seconds=time.perf_counter() - began)

    def _prune(self, newest: Path) -> None:
        """Keep the newest. Later steps than the newest are those that were damaged when this run began."""
        found = checkpoint.list_checkpoints(self.folder)
        now = found.index(newest)
        limit = self.settings.save_total_limit or len(found)
        for old in found[: max(0, now + 1 - limit)] + found[now + 1 :]:
            checkpoint.remove(old)

    def _give_up(self) -> None:
        """A checkpoint could not be written: the older ones stay, training goes on, and the next one is tried."""
        writing, self.writing = self.writing, None
        writing.thread.join()
        if writing.error:
            said = f"error [rank {dist.rank()}]: no checkpoint of step {writing.state['step']}: {writing.error}"
            print(said, file=sys.stderr, flush=True)
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(writing.folder, ignore_errors=True)
        self.failures += 1

    def _save_and_leave(self) -> None:
        self.watch.beat(LAST_SAVE)
        self._finish()
        if self.run.step > self.saved:
            self._save()
            self._finish()
        if self.run.step > self.saved:
            raise ValueError(f"stopped, but step {self.run.step} could not be saved; the newest is {self.saved}")
        dist.say(f"stopped at step {self.run.step} of {self.run.steps}; the same command goes on from there")


class _Writing:
    """One rank's part of a checkpoint on its way to the disk, in a thread."""

    def __init__(self, folder: Path, state: dict, taken: checkpoint.Snapshot):
        self.folder, self.state, self.taken = folder, state, taken
        self.done, self.error, self.seconds = False, None, 0.0
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            checkpoint.write(self.folder, dist.rank(), self.taken)
            self.taken.tensors.clear()
            self.done = True
        except Exception as error:  # whatever it was, all ranks have to hear of it
            self.error = error
        self.seconds = time.perf_counter() - began
