"""When a run saves a checkpoint, and how it leaves when it is stopped.

A checkpoint is copied to host memory between two steps and written by a thread while training goes on. The threads use
no collectives. Stop-requested, write-done and write-failed flags are all-reduced once per step (`dist.AsyncSum`), so
that every rank acts on them at the same step.
"""

import copy
import shutil
import threading
import time
from pathlib import Path

import torch
from torch import nn

from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.hf.checkpoint_folder import ModelFiles
from rm.model import lora
from rm.terminal import warn
from rm.training.resume import CheckpointSettings
from rm.training.run_log import RunLog
from rm.training.signals import FIRST_STEP, Watchdog

LAST_SAVE = 10  # times the watchdog's timeout, as FIRST_STEP is


class Checkpointer:
    """Saves when it is due and when the run is stopped: `after_step` after every step, `poll` between the micro-batches
    of an evaluation.

    `own` holds what a changed loop has to keep beside weights and optimizer state (docs/own_state.md).

    A stop is raised as `dist.Stopped`; on its way out of the `with` block the step's checkpoint is written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: RunLog,
        settings: CheckpointSettings,
        files: ModelFiles,
    ):
        """
        Args:
            files: make the folder of each checkpoint a model's.
        """
        self.files = files
        self.model, self.optimizer, self.run, self.settings = model, optimizer, run, settings
        self.folder = run.folder / "checkpoints"
        self.watchdog = Watchdog(settings.stall_timeout)
        self.flags = dist.AsyncSum()  # stop requested, write done, write failed
        self.saved_step = run.start.step  # of the newest checkpoint
        self.pending: _PendingWrite | None = None  # on all ranks or on none
        self.failures = 0  # in a row
        self.own: dict = copy.deepcopy(run.start.own)  # for a changed loop: JSON values, the same on every rank
        self.pinned: dict[str, torch.Tensor] = {}  # memory of snapshots on GPUs; no two are needed at a time

    def __enter__(self):
        if dist.is_main():
            for leftover in self.folder.glob(".step_*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        # A number that no earlier process of this run has: one that is still alive must not write among our files.
        stamp = torch.tensor(time.time_ns() if dist.is_main() else 0)
        self.attempt = f"{int(dist.sum_over_ranks(stamp)):x}"
        self.watchdog.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._finish_write()
            elif issubclass(kind, dist.Stopped):
                self._save_and_leave()
        finally:
            self.watchdog.__exit__(kind, error, trace)

    def after_step(self, step: int) -> None:
        """To be called when `step` steps are done. Raises Stopped as `poll` does."""
        if self.settings.save_steps and step % self.settings.save_steps == 0:
            self._begin_write()
        self.poll()
        if step == self.run.steps:
            self._finish_write()

    def after_evaluation(self) -> None:
        """To be called when an evaluation is logged: the step is saved where it is the best so far and may be wanted at
        the end, and where it ends the training."""
        run = self.run
        is_wanted = run.best.settings.load_best_model_at_end and run.best.step == run.step < run.steps
        if (is_wanted or run.stops_early) and not self._is_saved(run.step):
            self._begin_write()
        if run.stops_early:
            dist.say(f"stopping early at step {run.step} of {run.steps}; the best evaluation was {run.best}")
            self.watchdog.heartbeat(LAST_SAVE)
            self._finish_write()

    def _is_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, or one is being written. All ranks call it."""
        if self.pending is not None and self.pending.state["step"] == step:
            return True
        return dist.any_rank(dist.is_main() and (self.folder / f"step_{step}").is_dir())

    def load_best(self) -> None:
        """At the end: with --load_best_model_at_end fill the model with the weights of the best step, else say which
        step that is. The optimizer is left alone.

        Raises:
            ValueError: the checkpoint of that step is gone or corrupt.
        """
        self.watchdog.heartbeat(LAST_SAVE)
        self._finish_write()
        best, step = self.run.best, self.run.step
        if best.step is not None and best.settings.load_best_model_at_end and best.step != step:
            self._load_weights(self.folder / f"step_{best.step}")
            step = best.step
            dist.say(f"the model is that of {best}, the best evaluation")
        elif best.step == step:
            dist.say(f"the last evaluation was the best: {best}")
        elif best.step is not None:
            folder, model = self.folder / f"step_{best.step}", self.run.folder / f"model_step_{best.step}"
            if checkpoint.is_checkpoint(folder):
                how = f"python -m rm.export --model_name_or_path {folder} --output_dir {model}"
            else:
                how = "train into another --output_dir with --load_best_model_at_end true"
            dist.say(f"the best evaluation was {best}, and the model is that of step {step}; to get the best: {how}")
        self.run.note_model(step)

    def _load_weights(self, folder: Path) -> None:
        damage, state = None, {}
        try:
            state = checkpoint.read(folder)
            checkpoint.verify(folder, state)
        except checkpoint.CorruptCheckpoint as error:
            damage = error
        if dist.any_rank(damage is not None):
            raise ValueError(
                f"the best checkpoint cannot be loaded ({damage or 'another process says why'}): delete it and those "
                f"of later steps, and the same command trains these steps again"
            )
        sharding.reshard(self.model)
        checkpoint.load(lora.checkpointed(self.model), None, folder, state)

    def poll(self) -> None:
        """Act on the flags of all ranks. Raises Stopped if one of them received a stop signal."""
        if self.run.step == self.run.steps:
            self.watchdog.heartbeat(LAST_SAVE)  # after the last evaluation the model is exported, which may take long
        else:
            self.watchdog.heartbeat(FIRST_STEP if self.run.step == self.run.start.step else 1)
        flags = self.flags.take()
        stop = flags is not None and self._act_on(*flags)
        if self.failures == 2:
            raise ValueError(f"two checkpoints in a row could not be written; the newest is of step {self.saved_step}")
        if stop:
            raise dist.Stopped(self.watchdog.stop_signal or "another process was stopped", self.watchdog.signal_number)
        self._send_flags()

    def _send_flags(self) -> None:
        pending = self.pending
        written, failed = bool(pending and pending.done), bool(pending and pending.error)
        self.flags.send(bool(self.watchdog.stop_signal), written, failed)

    def _act_on(self, stop: float, written: float, failed: float) -> bool:
        """Publish or give up a checkpoint; return whether to stop. The arguments, and so the actions, are the same on
        every rank."""
        if failed:
            self._give_up()
        elif self.pending and written == dist.world_size():
            self._publish()
        return stop > 0

    def _begin_write(self) -> None:
        """Copy the training state and start writing it."""
        began = time.perf_counter()
        self._finish_write()
        unlogged_sums = self.run.collect()  # raises if a step was not finite: nothing is saved after it
        state = {
            "step": self.run.step,
            "unlogged_sums": list(unlogged_sums),
            "identity": self.run.start.identity,
            "best": self.run.best.state,
            "own": copy.deepcopy(self.own),
            "adapter": self.files.adapter,
        }
        folder = self.folder / f".step_{self.run.step}.{self.attempt}"
        snapshot = checkpoint.snapshot(lora.checkpointed(self.model), self.optimizer, self.pinned)
        self.pending = _PendingWrite(folder, state, snapshot, self.files)
        self.run.add_to_next_line(checkpoint_blocked_seconds=time.perf_counter() - began)

    def _finish_write(self) -> None:
        """Wait until the checkpoint that is being written is published, or given up."""
        if self.pending:
            self.pending.thread.join()
            self.flags.take()  # sent before the write was done
            self._send_flags()
            self._act_on(*self.flags.take())

    def _publish(self) -> None:
        pending = self.pending
        began = time.perf_counter()
        if dist.is_main():
            try:
                final = self.folder / f"step_{pending.state['step']}"
                checkpoint.publish(pending.folder, final, pending.state, pending.snapshot)
                self._prune(final)
            except (OSError, ValueError) as error:
                pending.error = error
        if dist.any_rank(pending.error is not None):
            self._give_up()
            return
        self.saved_step, self.pending, self.failures = pending.state["step"], None, 0
        blocked = time.perf_counter() - began
        self.run.add_to_next_line(checkpoint_seconds=pending.seconds, checkpoint_blocked_seconds=blocked)

    def _prune(self, newest: Path) -> None:
        """Keep the newest. Checkpoints of later steps are those that were corrupt when this run began."""
        checkpoints = checkpoint.list_checkpoints(self.folder)
        n = checkpoints.index(newest) + 1
        limit = self.settings.save_total_limit or len(checkpoints)
        old, kept = checkpoints[: max(0, n - limit)], checkpoints[max(0, n - limit) : n]
        if self.run.best.settings.load_best_model_at_end and old:
            # Whichever of those kept a run resumes from, the best one by then has to be there.
            best = {_best_step(folder) for folder in kept}
            old = [folder for folder in old if checkpoint.step_of(folder) not in best]
        for folder in old + checkpoints[n:]:
            checkpoint.remove(folder)

    def _give_up(self) -> None:
        """A checkpoint could not be written: older ones stay, training goes on, and the next one is tried."""
        pending, self.pending = self.pending, None
        pending.thread.join()
        if pending.error:
            step = pending.state["step"]
            warn(f"error [rank {dist.rank()}]: no checkpoint of step {step}: {pending.error}")
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(pending.folder, ignore_errors=True)
        self.failures += 1
        best = self.run.best
        if best.settings.load_best_model_at_end and best.step == pending.state["step"] < self.run.step:
            raise ValueError(
                f"the best checkpoint so far, of {best}, could not be written; the same command resumes from step "
                f"{self.saved_step}"
            )

    def _save_and_leave(self) -> None:
        self.watchdog.heartbeat(LAST_SAVE)
        self._finish_write()
        if self.run.step > self.saved_step:
            self._begin_write()
            self._finish_write()
        if self.run.step > self.saved_step:
            raise ValueError(f"stopped, but step {self.run.step} could not be saved; the newest is {self.saved_step}")
        dist.say(f"stopped at step {self.run.step} of {self.run.steps}; the same command resumes from there")


def _best_step(folder: Path) -> int | None:
    """The step of the best evaluation when a checkpoint was written; None if there was none, or for a corrupt one."""
    try:
        return (checkpoint.read(folder).get("best") or {}).get("step")
    except (OSError, ValueError):
        return None


class _PendingWrite:
    """One rank's part of a checkpoint while a thread writes it to disk."""

    def __init__(self, folder: Path, state: dict, snapshot: checkpoint.Snapshot, files: ModelFiles):
        self.folder, self.state, self.snapshot, self.files = folder, state, snapshot, files
        self.done, self.error, self.seconds = False, None, 0.0
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            checkpoint.write(self.folder, dist.rank(), self.snapshot)
            checkpoint.write_files(self.folder, self.files.contents)
            self.snapshot.tensors.clear()
            self.done = True
        except Exception as error:  # of any kind: all ranks have to know
            self.error = error
        self.seconds = time.perf_counter() - began
