"""AdamW and the learning rate, which is a function of the step alone: on resume there is no scheduler to restore."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

from rm.config import SettingsGroup, require_not_negative, require_positive, setting
from rm.distributed.sharding import local

AT_ONCE = 2**22  # values whose moments are float32 at a time, where they are kept in bfloat16


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
    optimizer_state_dtype: str = setting(
        "float32",
        "what AdamW's two means are kept in; bfloat16, rounded stochastically, takes 4 bytes less per parameter",
        choices=("float32", "bfloat16"),
    )
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
    cls = torch.optim.AdamW if settings.optimizer_state_dtype == "float32" else ShortStateAdamW
    return cls(param_groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)


class ShortStateAdamW(torch.optim.AdamW):
    """AdamW whose means of gradients and of squared gradients are kept in bfloat16 between steps.

    A step is torch's own, in float32, of a part of a parameter at a time. Then the mean is rounded to the nearest
    bfloat16, the mean of squares stochastically: with beta2 = 0.999 a step changes it by a thousandth, and the nearest
    of two numbers that are 1/128 apart would be the old one, for ever (docs/numerics.md).
    """

    dtypes = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}  # other state is kept as its parameter is

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: nn.Parameter, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state |= {kind: torch.zeros_like(p, dtype=dtype) for kind, dtype in self.dtypes.items()}
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
        options |= {"found_inf": getattr(self, "found_inf", None)}  # a step that is skipped changes nothing
        before = state["step"].clone()
        parts = [local(x) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        rows = max(1, AT_ONCE * len(parts[0]) // max(1, parts[0].numel()))
        for n, (weight, gradient, mean, square) in enumerate(zip(*(x.split(rows) for x in parts), strict=True)):
            exact_mean, exact_square = mean.float(), square.float()
            state["step"].copy_(before)
            beta1, beta2 = group["betas"]
            means = [exact_mean], [exact_square], [], [state["step"]]
            adamw_step([weight], [gradient.contiguous()], *means, beta1=beta1, beta2=beta2, **options)
            mean.copy_(exact_mean)
            square.copy_(round_stochastically(exact_square, n, before))


def round_stochastically(x: Tensor, part: int, step: Tensor) -> Tensor:
    """Round to bfloat16, up or down by chance, so that the expected value is x.

    Chance is a hash of a value's index, its part and the step: the same on every copy of a shard and in a resumed run,
    without a generator's state.

    Args:
        x: float32, of at most 2**31 values.
        part: a number, so that other parts of a parameter have other chances.
        step: a number on x's device.

    Returns:
        float32 values that bfloat16 holds.
    """
    noise = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    noise += step.to(torch.int32) * 0x1E3779B1 + part * 0x85EBCA77 % 2**31  # odd: another start for each of them
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):  # "lowbias32", nullprogram.com/blog/2018/07/31
        noise ^= noise >> shift
        noise *= factor
    bits = x.contiguous().view(torch.int32)  # bfloat16 is the upper half of float32
    return (bits + (noise.view_as(x) >> 16 & 0xFFFF) & -0x10000).view(torch.float32)


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
