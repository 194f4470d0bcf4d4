"""LISA (arXiv 2403.17919): all weights get trained, but at any time only a few layers, drawn anew every so many steps.

Which layers, is a function of (seed, step) alone: every rank agrees without a word, and a run that resumes in the
middle of an interval trains the same ones. A frozen layer has no gradient, no weight-gradient product and, unless it
is asked to wait, no optimizer state; below the lowest trained layer the backward stops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm.config import require_positive, setting
from rm.distributed import sharding


@dataclass(frozen=True, kw_only=True)
class LisaSettings:
    """LISA"""

    use_lisa: bool = setting(False, "train a few layers at a time, drawn anew every interval, instead of all at once")
    lisa_activated_layers: int = setting(2, "how many layers train at a time")
    lisa_interval_steps: int = setting(20, "how many steps they do so")
    lisa_train_embeddings: bool = setting(True, "always train the embeddings, and a head that is tied to them")
    lisa_train_head: bool = setting(True, "always train the last norm and the head; a reward model's score head is new")
    lisa_state: str = setting(
        "drop",
        "Adam's moments of a layer that is frozen again: forgotten, kept where they are, or moved to the CPU's memory",
        choices=("drop", "keep", "cpu"),
    )

    def check(self) -> None:
        for name in ("lisa_activated_layers", "lisa_interval_steps"):
            require_positive(self, name)
        if self.use_lisa and getattr(self, "use_lora", False):
            raise ValueError("--use_lora and --use_lisa exclude each other: adapters train in every layer; give one")


def check_depth(n_layers: int, settings: LisaSettings) -> None:
    """There must be enough layers to draw from."""
    if settings.use_lisa and settings.lisa_activated_layers > n_layers:
        raise ValueError(
            f"--lisa_activated_layers {settings.lisa_activated_layers} is more than the model's {n_layers}: lower it"
        )


def active_layers(step: int, n_layers: int, seed: int, settings: LisaSettings) -> list[int]:
    """The layers that train in optimizer step `step` (from 0): drawn uniformly, without replacement, per interval."""
    interval = step // settings.lisa_interval_steps
    drawn = np.random.default_rng([seed, interval, 0x115A]).choice(
        n_layers, settings.lisa_activated_layers, replace=False
    )
    return sorted(drawn.tolist())


def switch(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings) -> None:
    """Before a step: let train what trains in it, and no more. Does nothing without --use_lisa.

    Args:
        optimizer: over all parameters; one without a gradient is left alone by AdamW.
        settings: LisaSettings, and `seed`.
    """
    if not settings.use_lisa:
        return
    layers = active_layers(step, len(model.layers), settings.seed, settings)
    changed = False
    for name, p in model.named_parameters():
        trains = _trains(name, layers, settings)
        if trains != p.requires_grad:
            p.requires_grad_(trains)
            _place_moments(optimizer.state, p, trains, settings.lisa_state)
            changed = True
    if changed:
        sharding.requires_grad_changed(model)


def _trains(name: str, layers: list[int], settings: LisaSettings) -> bool:
    unit, _, rest = name.partition(".")
    if unit == "layers":
        return int(rest.partition(".")[0]) in layers
    if unit in ("embed", "embed_positions"):
        return settings.lisa_train_embeddings
    return settings.lisa_train_head or unit == "score"


def _place_moments(state: dict, p: nn.Parameter, trains: bool, policy: str) -> None:
    """Adam's moments where they belong: with a parameter that trains; as `policy` says with one that does not."""
    if p not in state:
        return
    if not trains and policy == "drop":
        del state[p]
    elif not trains and policy == "cpu":
        state[p] = {key: sharding.local(x).cpu() for key, x in state[p].items()}  # a rank's own part, and no DTensor
    elif trains:
        state[p] = {key: _beside(p, x) if x.ndim else x for key, x in state[p].items()}  # all but the step count


def _beside(p: nn.Parameter, x: Tensor) -> Tensor:
    """A moment of `p` that may have waited on the CPU, on p's device and sharded as p is."""
    if isinstance(x, DTensor) or not isinstance(p, DTensor):
        return x.to(p.device)
    return DTensor.from_local(
        x.to(p.device), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
