"""AdamW and the learning rate, which is a function of the step alone: on resume there is no scheduler to restore."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from rm.config import require_positive, setting


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimizer"""

    learning_rate: float = setting(1e-5, "peak learning rate; adapters want ten times that of all weights")
    lr_scheduler_type: str = setting("linear", "shape of the decay to zero", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = setting(0.03, "share of the steps over which the learning rate rises from zero")
    weight_decay: float = setting(0.0, "decoupled weight decay on matrices; norms and biases have none")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm over all parameters; 0 = no clipping")

    def check(self) -> None:
        require_positive(self, "learning_rate")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"--warmup_ratio is a share of the steps, from 0 to 1, got {self.warmup_ratio}")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what trains. Fused: one kernel, five times the plain loop on CPU too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=True)


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warmup, then the decay that `--lr_scheduler_type` names."""
    warmup = round(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # 1 at the end of warmup, towards 0 after the last step
    shape = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return settings.learning_rate * shape[settings.lr_scheduler_type]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
