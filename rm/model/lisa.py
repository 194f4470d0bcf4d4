"""LISA (arXiv 2403.17919): all weights are trained, but only a few layers at a time, redrawn every few steps.

Which layers train is a function of (seed, step) alone: every rank computes the same ones without communication, and so
does a run that resumes in the middle of an interval. A frozen layer has no gradient, no weight-gradient products and,
by default, no optimizer state; below the lowest trained layer the backward stops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rm.config import SettingsGroup, require_positive, setting
from rm.distributed import sharding


@dataclass(frozen=True, kw_only=True)
class LisaSettings(SettingsGroup):
    """LISA"""

    use_lisa: bool = setting(False, "train a few layers at a time, redrawn every interval, instead of all at once")
    lisa_activated_layers: int = setting(2, "layers that train at a time")
    lisa_interval_steps: int = setting(20, "steps between re-draws")
    lisa_train_embeddings: bool = setting(True, "always train the embeddings, and an LM head that is tied to them")
    lisa_train_head: bool = setting(
        True, "always train the last norm and the LM head; a reward model's score head always trains"
    )
    lisa_state: str = setting(
        "drop",
        "what to do with the Adam moments of a layer that is frozen again: drop, keep, or move to CPU memory",
        choices=("drop", "keep", "cpu"),
    )

    def check(self) -> None:
        require_positive(lisa_activated_layers=self.lisa_activated_layers, lisa_interval_steps=self.lisa_interval_steps)


def check_depth(n_layers: int, settings: LisaSettings) -> None:
    """Raise ValueError where the model has fewer layers than are to be trained at a time."""
    if settings.use_lisa and settings.lisa_activated_layers > n_layers:
        raise ValueError(
            f"--lisa_activated_layers {settings.lisa_activated_layers} is more than the model's {n_layers}: lower it"
        )


def active_layers(step: int, n_layers: int, seed: int, settings: LisaSettings) -> list[int]:
    """The layers that train in optimizer step `step` (from 0): drawn uniformly, without replacement, per interval."""
    interval = step // settings.lisa_interval_steps
    generator = np.random.default_rng([seed, interval, 0x115A])
    return sorted(generator.choice(n_layers, settings.lisa_activated_layers, replace=False).tolist())


def activate_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: LisaSettings, seed: int
) -> None:
    """Before a step: unfreeze what trains in it and freeze the rest. Does nothing without --use_lisa.

    Args:
        optimizer: over all parameters; AdamW skips those without a gradient.
    """
    if not settings.use_lisa:
        return
    layers = active_layers(step, len(model.layers), seed, settings)
    changed = False
    for name, p in model.named_parameters():
        trains = _trains(name, layers, model.fp32_modules, settings)
        if trains != p.requires_grad:
            p.requires_grad_(trains)
            _place_moments(optimizer.state, p, trains, settings.lisa_state)
            changed = True
    if changed:
        sharding.requires_grad_changed(model)


def _trains(name: str, layers: list[int], always: tuple[str, ...], settings: LisaSettings) -> bool:
    unit, _, rest = name.partition(".")
    if unit == "layers":
        return int(rest.partition(".")[0]) in layers
    if unit in ("embed", "embed_positions"):
        return settings.lisa_train_embeddings
    return settings.lisa_train_head or unit in always


def _place_moments(state: dict, p: nn.Parameter, trains: bool, policy: str) -> None:
    """Move Adam's moments: to a parameter that trains; as `policy` says for one that does not."""
    if p not in state:
        return
    if not trains and policy == "drop":
        del state[p]
    elif not trains and policy == "cpu":
        state[p] = {key: sharding.local(x).cpu() for key, x in state[p].items()}  # this rank's part, as a plain tensor
    elif trains:
        state[p] = {key: _moved_to(p, x) for key, x in state[p].items()}


def _moved_to(p: nn.Parameter, x: Tensor) -> Tensor:
    """What Adam keeps of `p`, which may have been moved to the CPU: on p's device, and a moment sharded as p is.

    The step count too: fused AdamW reads it on the device.
    """
    is_step_count = x.ndim == 0
    if is_step_count or sharding.is_dtensor(x) or not sharding.is_dtensor(p):
        return x.to(p.device)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        x.to(p.device), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
