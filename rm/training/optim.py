"""AdamW and the learning rate, which is a function of the step alone: on resume there is no scheduler to restore."""

import math
from collections import defaultdict
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
    loraplus_lr_ratio: float = setting(1.0, "rate of an adapter's B over that of its A (LoRA+); 16 in the paper")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm over all parameters; 0 = no clipping")

    def check(self) -> None:
        for name in ("learning_rate", "loraplus_lr_ratio"):
            require_positive(self, name)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"--warmup_ratio is a share of the steps, from 0 to 1, got {self.warmup_ratio}")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what trains. Fused: one kernel, five times the plain loop on CPU too."""
    groups = defaultdict(list)  # (weight decay, ratio of its rate) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = settings.weight_decay if p.ndim > 1 else 0.0
            ratio = settings.loraplus_lr_ratio if name.endswith(".lora_B") else 1.0  # LoRA+, arXiv 2402.12354
            groups[decay, ratio].append(p)
    made = [{"params": params, "weight_decay": decay, "ratio": ratio} for (decay, ratio), params in groups.items()]
    return torch.optim.AdamW(made, lr=settings.learning_rate, fused=True)


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
        group["lr"] = rate * group["ratio"]
