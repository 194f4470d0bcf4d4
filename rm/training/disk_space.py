"""Whether the disk has room for what a training will write, so that a full one is noticed before the first step."""

import shutil
from pathlib import Path

import torch

from rm.distributed import checkpoint
from rm.model import lora
from rm.model.nf4 import count_parameters
from rm.model.transformer import Transformer
from rm.training.optim import OptimSettings
from rm.training.resume import CheckpointSettings


def checkpoint_bytes(model: Transformer, settings: OptimSettings) -> int:
    """Of the tensors of one checkpoint, of all ranks: parameters, and AdamW's two means of those that train."""
    state = 2 * getattr(torch, settings.optimizer_state_dtype).itemsize
    saved = lora.checkpointed(model).values()
    return sum(p.numel() * (p.element_size() + state * p.requires_grad) for p in saved)


def model_bytes(model: Transformer) -> int:
    """Of the weights in the folder model/, in which adapters are merged."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if lora.is_adapter(name))
    return (count_parameters(model) - adapters) * model.compute_dtype.itemsize


def too_little(
    out: Path, model: Transformer, settings: CheckpointSettings, optim: OptimSettings, steps: int
) -> str | None:
    """A warning where a run's disk has less room than the run needs; None where it has enough.

    Args:
        steps: that are still to be done.
    """
    limit, there = settings.save_total_limit, len(checkpoint.list_checkpoints(out / "checkpoints"))
    saves = max(1, steps // settings.save_steps) if settings.save_steps else 1  # one, where the run is stopped
    # An old checkpoint is removed once a new one is complete.
    new = max(1, min(saves, limit + 1 - there)) if limit else saves
    of_checkpoint, of_model = checkpoint_bytes(model, optim), model_bytes(model)
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(folder).free, new * of_checkpoint + of_model
    if free >= needed:
        return None
    return (
        f"the disk of --output_dir {out} has {_gb(free)} free, and this run writes {_gb(needed)}: model/ of "
        f"{_gb(of_model)} and at most {new} more checkpoints at a time of {_gb(of_checkpoint)} "
        f"(--save_total_limit {limit}). Make room, or name a folder on another disk"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
