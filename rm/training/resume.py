"""Where a run begins: at step 0, or where it was stopped, and only if it is the same training.

The same command resumes from the newest valid checkpoint of its --output_dir. Learning rate, data order and dropout are
functions of (seed, step), so only weights, optimizer state and the step are restored. With as many processes as before,
the rest of the run is as equal to an uninterrupted one as two runs of the same command are: bit-identical on a CPU with
one thread, up to the last bits on a GPU (docs/numerics.md). With another number of processes, or other micro-batches,
it sees the same batches and differs by rounding (and by dropout, which every process draws for itself).

A run whose learning rate is constant may be given more steps, also when it is finished: it goes on from its newest
checkpoint.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rm.config import SettingsGroup, changed_settings, fixed_settings, flatten, require_not_negative, setting
from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from rm.distributed.lease import check_writable
from rm.distributed.sharding import dtype_name
from rm.hf import weights
from rm.model import lora
from rm.run_files import read_run
from rm.terminal import warn
from rm.training import run_log

AUTO, NONE = "auto", "none"
LENGTH = ("num_train_epochs", "max_steps")  # the settings that say how long a run is


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(SettingsGroup):
    """Checkpoints"""

    save_steps: int = setting(
        500,
        "write a checkpoint every this many steps, besides the one when the run is stopped; 0: only that one",
        may_change=True,
    )
    save_total_limit: int = setting(2, "keep this many checkpoints, the newest; 0: all", may_change=True)
    resume_from_checkpoint: str = setting(
        AUTO,
        "auto: resume from the newest valid checkpoint of --output_dir, if there is one; none: always start anew; or "
        "a checkpoint's folder, or hub:org/name, to start a new --output_dir from",
        may_change=True,
        hub="checkpoint",
    )
    stall_timeout: float = setting(
        1800,
        "end the process, and print the stacks of its threads, after this many seconds without a step; 0: never",
        may_change=True,
    )

    def check(self) -> None:
        require_not_negative(
            save_steps=self.save_steps, save_total_limit=self.save_total_limit, stall_timeout=self.stall_timeout
        )


def is_finished(
    output_dir: str, settings: CheckpointSettings, all_settings: SettingsGroup, last: str = "model"
) -> bool:
    """Whether the run in --output_dir is finished. All ranks call it, before a name on the hub is asked for.

    Args:
        all_settings: the script's, as given, which have to be those of the run that the folder holds.
        last: what the run writes last: where it is missing, the end is done again from the newest checkpoint.

    Raises:
        ValueError: the folder holds another run, or cannot be written.
    """
    out, is_extended = Path(output_dir), False
    if settings.resume_from_checkpoint != NONE and (out / "run.json").exists():
        changed = changed_settings(all_settings, _settings_of(out, all_settings))
        _refuse(f"--output_dir {out} holds another run", changed, all_settings)
        is_extended = bool(changed)
    else:
        run_log.check_unused(output_dir)
    check_writable(out)
    if not dist.any_rank((out / last).exists()):
        return False
    if is_extended:
        if not checkpoint.list_checkpoints(out / "checkpoints"):
            raise ValueError(f"{out}: this run is finished, and --save_steps has left no checkpoint to extend it from")
        return False
    damage = _damage(out) if dist.is_main() else None
    if dist.any_rank(damage is not None):
        _undo_end(out, last, damage)
        return False
    if dist.is_main():
        run_log.complete(out)
    return True


def _damage(out: Path) -> str | None:
    """What is wrong with the weights of a finished run, as far as sizes and headers tell; None if nothing is."""
    for folder in (out / "model", out / "adapter"):
        try:
            if folder.name == "model" or folder.is_dir():
                weights.check_whole(folder)
        except ValueError as error:
            return str(error)
    return None


def _undo_end(out: Path, last: str, damage: str | None) -> None:
    """Have the end of a finished run, whose weights are damaged, be done again. All ranks call it."""
    if not checkpoint.list_checkpoints(out / "checkpoints"):
        raise ValueError(
            f"{damage or out}: this run is finished, its weights are damaged, and it has no checkpoint to save them "
            f"from again. Delete {out} to train anew"
        )
    dist.say(f"this run is finished, but {damage}: its end is done again")
    if dist.is_main() and (out / last).is_file():
        (out / last).unlink()  # what is killed from here on is not finished
    dist.barrier()


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    output_dir: str,
    settings: CheckpointSettings,
    all_settings: SettingsGroup,
    base: str,
    facts: dict,
    steps: int,
) -> run_log.Start:
    """Fill model and optimizer from the newest valid checkpoint, if there is one. All ranks call it.

    Args:
        base: the folder of the model that the training starts from.
        facts: of the training data, from `rm.data.dataset.load`.
        steps: of the whole training; more than before extend it.

    Raises:
        ValueError: the checkpoint is of another training, or of a step that cannot be gone on from; or there are
            checkpoints and all are corrupt.
    """
    identity = _identity(model, all_settings, base, facts)
    candidates = _candidates(output_dir, settings)
    for folder in candidates:
        state = _valid_state(folder, all_settings, identity)
        if state:
            _check_length(folder, state, all_settings, steps)
            checkpoint.load(lora.checkpointed(model), optimizer, folder, state)
            _keep_model(Path(output_dir), all_settings, steps)
            dist.say(f"resuming from {folder}{_world_size_note(state)}")
            # Of another run's checkpoint, the best one is not here.
            best = state.get("best") if folder.parent == Path(output_dir) / "checkpoints" else None
            return run_log.Start(state["step"], tuple(state["unlogged_sums"]), identity, best, state.get("own", {}))
    if candidates:
        raise ValueError(
            f"all checkpoints in {candidates[0].parent} are corrupt: delete them to start anew, or name another "
            f"--output_dir"
        )
    return run_log.Start(identity=identity)


def _candidates(output_dir: str, settings: CheckpointSettings) -> list[Path]:
    """Checkpoints to resume from, newest first."""
    wanted = settings.resume_from_checkpoint
    own = checkpoint.list_checkpoints(Path(output_dir) / "checkpoints")[::-1]
    if own or wanted in (AUTO, NONE):
        return own
    if not (Path(wanted) / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: expected {AUTO}, {NONE} or the folder of a checkpoint, such as "
            f"runs/rm/checkpoints/step_500"
        )
    return [Path(wanted)]


def _valid_state(folder: Path, all_settings: SettingsGroup, identity: dict) -> dict | None:
    """The checkpoint's state.json; None, on every rank, if any rank finds it corrupt."""
    state, damage = None, None
    try:
        state = checkpoint.read(folder)
        differences = _differences(all_settings, state["identity"], identity)
        _refuse(f"{folder} is of another training", differences, all_settings)
        checkpoint.verify(folder, state)
    except checkpoint.CorruptCheckpoint as error:
        damage = error
        warn(f"skipping a corrupt checkpoint: {damage}")
    return None if dist.any_rank(damage is not None) else state


def _identity(model: nn.Module, all_settings: SettingsGroup, base: str, facts: dict) -> dict:
    """What makes a training what it is."""
    return {
        "settings": fixed_settings(all_settings),
        "model": weights.fingerprint(base),
        "head": model.head,
        "dtype": dtype_name(model.compute_dtype),
        "data": facts["train"]["sha256"],
        "tokenizer": facts["tokenizer"],
    }


def _differences(all_settings: SettingsGroup, saved: dict, current: dict) -> dict[str, tuple]:
    others = {name: (saved.get(name), current[name]) for name in current if name != "settings"}
    others = {name: (before, now) for name, (before, now) in others.items() if before != now}
    return changed_settings(all_settings, saved["settings"]) | others


def _refuse(what: str, differences: dict[str, tuple], settings: SettingsGroup) -> None:
    """Raise ValueError for differences, but not for another length of a training whose learning rate is constant."""
    schedule = flatten(settings)["lr_scheduler_type"]
    only_longer = differences.keys() <= set(LENGTH)
    if not differences or (only_longer and schedule == "constant"):
        return
    listed = "; ".join(f"{name}: then {before}, now {now}" for name, (before, now) in differences.items())
    remedy = "Give the same values to resume, or another --output_dir to start anew"
    if only_longer:
        remedy = (
            f"With --lr_scheduler_type {schedule} the learning rate depends on the number of steps, so that this run "
            f"cannot be extended; with constant it could. To train more, start from its model, into another "
            f"--output_dir"
        )
    raise ValueError(f"{what}: {listed}. {remedy}")


def _check_length(folder: Path, state: dict, settings: SettingsGroup, steps: int) -> None:
    """Raise ValueError where a training of another length cannot go on from a checkpoint."""
    step = state["step"]
    if step > steps:
        raise ValueError(f"{folder} is of step {step}, and the training would end at {steps}: give it more steps")
    warmup = round(flatten(settings)["warmup_ratio"] * steps)
    if step < warmup and changed_settings(settings, state["identity"]["settings"]):
        raise ValueError(
            f"{folder} is of step {step}, and in a training of {steps} steps the learning rate rises until {warmup} "
            f"(--warmup_ratio): it cannot be extended so far"
        )


def _keep_model(out: Path, settings: SettingsGroup, steps: int) -> None:
    """Rename what a run that is extended has saved, so that it is not taken for what the longer one saves."""
    is_extended = (out / "run.json").is_file() and bool(changed_settings(settings, _settings_of(out, settings)))
    dist.barrier()  # all ranks have looked
    if not is_extended:
        return
    dist.say(f"this run is extended to {steps} steps")
    step = read_run(out).get("model_step")
    for folder in (out / "adapter", out / "model"):
        if dist.is_main() and folder.is_dir():
            kept = folder.with_name(f"{folder.name}_step_{step}")
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            dist.say(f"what it has saved in {folder} is kept in {kept}")


def _settings_of(out: Path, settings: SettingsGroup) -> dict:
    """The settings of the run in a folder: a name on the hub where `settings` has that name, else its path."""
    run = read_run(out)
    saved = run.get("settings")
    if not isinstance(saved, dict):
        raise ValueError(f"--output_dir {out} already holds another run (run.json): name a new folder")
    now = fixed_settings(settings)
    return saved | {name: value for name, value in run.get("given", {}).items() if now.get(name) == value}


def _world_size_note(state: dict) -> str:
    before, now = state["world_size"], dist.world_size()
    if before == now:
        return ""
    return f", written by {before} processes and read by {now}: the same up to rounding and dropout"
