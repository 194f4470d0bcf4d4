"""AdamW and the learning rate, which is a function of the step alone: on resume there is no scheduler to restore."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from rm.config import SettingsGroup, require_not_negative, require_positive, setting


@dataclass(frozen=True, kw_only=True)
class OptimSettings(SettingsGroup):
    """Optimizer"""

    learning_rate: float = setting(1e-5, "peak learning rate; with --use_lora, ten times the default is usual")
    lr_scheduler_type: str = setting("linear", "shape of the decay", choices=("linear", "cosine", "constant"))
    min_lr_ratio: float = setting(
        0.0, "the decay ends at this share of the peak: 0.1 with cosine is InstructGPT's schedule"
    )
    warmup_ratio: float = setting(0.03, "share of the steps over which the learning rate rises from zero")
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices; norms and biases have none")
    adam_beta1: float = setting(0.9, "decay rate of AdamW's mean of gradients")
    adam_beta2: float = setting(0.999, "decay rate of AdamW's mean of squared gradients")
    adam_epsilon: float = setting(1e-8, "added to the root of AdamW's mean of squared gradients")
    loraplus_lr_ratio: float = setting(1.0, "learning rate of an adapter's B over that of its A (LoRA+: 16)")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm over all parameters; 0: no clipping")

    def check(self) -> None:
        require_positive(
            learning_rate=self.learning_rate, loraplus_lr_ratio=self.loraplus_lr_ratio, adam_epsilon=self.adam_epsilon
        )
        require_not_negative(weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"--warmup_ratio is a share of the steps, from 0 to 1, got {self.warmup_ratio}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"--min_lr_ratio is a share of --learning_rate, from 0 to 1, got {self.min_lr_ratio}")
        for name, beta in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, got {beta}")


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the parameters that train.

    Fused: one kernel, five times as fast as the plain loop on a CPU too; and it heeds `optimizer.found_inf`, with which
    `train_step` skips an update on the device.
    """
    groups = defaultdict(list)  # (weight decay, learning rate ratio) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = settings.weight_decay if p.ndim > 1 else 0.0
            ratio = settings.loraplus_lr_ratio if name.endswith(".lora_B") else 1.0  # LoRA+, arXiv 2402.12354
            groups[decay, ratio].append(p)
    param_groups = [
        {"params": params, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), params in groups.items()
    ]
    betas = settings.adam_beta1, settings.adam_beta2
    return torch.optim.AdamW(
        param_groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True
    )


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warmup, then the decay that `--lr_scheduler_type` names."""
    warmup = round(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    remaining = (steps - step) / max(1, steps - warmup)  # 1 at the end of warmup, towards 0 after the last step
    factor = {"linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2, "constant": 1.0}
    lowest = settings.min_lr_ratio
    return settings.learning_rate * (lowest + (1 - lowest) * factor[settings.lr_scheduler_type])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
