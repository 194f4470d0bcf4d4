"""Where a run begins: at step 0, or where it was stopped, and only if it is the same training.

The same command again goes on from the newest good checkpoint of its --output_dir. Learning rate, data order and
dropout are functions of (seed, step), so what is restored is weights, optimizer state and a number: with as many
processes as before the rest of the run is, bit for bit, what it would have been; with another number of processes, or
other rows, it sees the same batches and differs by rounding (and by dropout, which is drawn by each process).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rm.config import changed, fixed, setting
from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.files import read_json
from rm.hf import weights
from rm.model import lora
from rm.training import run_log

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, kw_only=True)
class ResumeSettings:
    """Checkpoints"""

    save_steps: int = setting(
        500,
        "write a checkpoint every this many steps, besides the one when the run is told to stop; 0: only that one",
        may_change=True,
    )
    save_total_limit: int = setting(2, "keep this many checkpoints, the newest; 0: all", may_change=True)
    resume_from_checkpoint: str = setting(
        AUTO,
        "auto: go on from the newest good checkpoint of --output_dir, if there is one; none: only start anew; or the "
        "folder of a checkpoint with which an --output_dir that has none begins",
        may_change=True,
    )
    stall_timeout: float = setting(
        1800,
        "end the process, and show where it hangs, after this many seconds without a step; 0: never",
        may_change=True,
    )

    def check(self) -> None:
        for name in ("save_steps", "save_total_limit", "stall_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")


def check_folder(settings, last: str = "model") -> None:
    """Refuse an --output_dir that holds another run or cannot be written; leave with 0 where this run is finished.

    Args:
        last: what the run writes last: where that is missing, its end is done again from the newest checkpoint.
    """
    out = Path(settings.output_dir)
    if settings.resume_from_checkpoint == NONE:
        run_log.check_unused(settings.output_dir)
    elif (out / "run.json").exists():
        _refuse(f"--output_dir {out} holds another run", changed(settings, _settings_of(out)))
    else:
        run_log.check_unused(settings.output_dir)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {out} cannot be written: {there} is {'read-only' * there.is_dir() or 'a file'}")
    if dist.any_rank((out / last).exists()):
        if dist.is_main() and read_json(out / "exit.json").get("status") != "finished":  # a full disk, or a power cut
            run_log.mark_end(out, status="finished", reason="found finished")
        dist.say(f"{out}: this run is finished; nothing to do")
        sys.exit(0)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, settings, facts: dict) -> run_log.Start:
    """Fill model and optimizer from the newest good checkpoint, if there is one. All ranks call it.

    Raises:
        ValueError: the checkpoint is of another training; or there are checkpoints and none of them is good.
    """
    identity = _identity(model, settings, facts)
    found = _candidates(settings)
    for folder in found:
        state = _good(folder, settings, identity)
        if state:
            checkpoint.load(lora.checkpointed(model), optimizer, folder, state)
            dist.say(f"going on from {folder}{_other_world(state)}")
            return run_log.Start(state["step"], tuple(state["unsaid"]), identity)
    if found:
        raise ValueError(
            f"none of the checkpoints in {found[0].parent} is good: to begin anew delete them, or name another "
            f"--output_dir"
        )
    return run_log.Start(identity=identity)


def _candidates(settings) -> list[Path]:
    """Checkpoints to go on from, best first."""
    wanted = settings.resume_from_checkpoint
    own = checkpoint.list_checkpoints(Path(settings.output_dir) / "checkpoints")[::-1]
    if own or wanted in (AUTO, NONE):
        return own
    if not Path(wanted).is_dir():
        raise ValueError(f"--resume_from_checkpoint {wanted}: expected {AUTO}, {NONE} or the folder of a checkpoint")
    return [Path(wanted)]


def _good(folder: Path, settings, identity: dict) -> dict | None:
    """The checkpoint's state.json; None, on every rank, if any rank finds something damaged."""
    state, damage = None, None
    try:
        state = checkpoint.read(folder)
        _refuse(f"{folder} is of another training", _differences(settings, state["identity"], identity))
        checkpoint.verify(folder, state)
    except checkpoint.CorruptCheckpoint as found:
        damage = found
        print(f"damaged checkpoint, passed over: {damage}", file=sys.stderr, flush=True)
    return None if dist.any_rank(damage is not None) else state


def _identity(model: nn.Module, settings, facts: dict) -> dict:
    """What makes a training what it is."""
    return {
        "settings": fixed(settings),
        "model": weights.fingerprint(settings.model_name_or_path),
        "head": model.head,
        "dtype": str(sharding.compute_dtype(settings)).removeprefix("torch."),
        "data": facts["data"]["train"]["sha256"],
        "tokenizer": facts["data"]["tokenizer"],
    }


def _differences(settings, there: dict, here: dict) -> dict[str, tuple]:
    others = {name: (there.get(name), here[name]) for name in here if name != "settings"}
    return changed(settings, there["settings"]) | {name: (a, b) for name, (a, b) in others.items() if a != b}


def _refuse(what: str, differences: dict[str, tuple]) -> None:
    if differences:
        listed = "; ".join(f"{name} is {there} there, {here} here" for name, (there, here) in differences.items())
        raise ValueError(f"{what}: {listed}. Give the same to go on, or another --output_dir to begin anew")


def _settings_of(out: Path) -> dict:
    saved = read_json(out / "run.json").get("settings")
    if not isinstance(saved, dict):
        raise ValueError(f"--output_dir {out} already holds another run (run.json): name a new folder")
    return saved


def _other_world(state: dict) -> str:
    if state["world"] == dist.world_size():
        return ""
    return f", written by {state['world']} processes and read by {dist.world()}: the same up to rounding and dropout"
