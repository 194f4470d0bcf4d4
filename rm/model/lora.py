"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers of a finished model are replaced by adapted ones.

`adapt` freezes the base model and replaces the named layers by ones that share the base's own parameters, so that no
existing name changes and the base is loaded and sharded as ever; `rm.hf.adapter` saves, reads and merges adapters.
A frozen base has no gradients, no weight-gradient products and no optimizer state. The modules that a model lists in
`fp32_modules`, a reward model's new score head, stay fully trained.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm.config import SettingsGroup, require_positive, setting
from rm.model.nf4 import NF4Linear, quantize_layers

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings(SettingsGroup):
    """LoRA"""

    use_lora: bool = setting(False, "train low-rank adapters (and a reward model's score head) instead of all weights")
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "the adapters are scaled by lora_alpha / lora_r")
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(lora_r) instead: better at high ranks (rsLoRA)")
    lora_dropout: float = setting(0.1, "dropout on an adapter's input")
    lora_target_modules: tuple[str, ...] = setting(("q_proj", "v_proj"), f"layers to adapt, or {ALL_LINEAR}")
    load_in_4bit: bool = setting(
        False,
        "keep the matrices of the frozen base in 4 bits (QLoRA's NF4 with double quantization), whole on every "
        "process; what is exported is the original base with the adapter merged",
    )
    shard_base: bool = setting(
        True,
        "shard the frozen base; false: each process holds all of it, and only adapter gradients are exchanged",
        may_change=True,
    )

    def check(self) -> None:
        require_positive(lora_r=self.lora_r, lora_alpha=self.lora_alpha)
        if not self.lora_target_modules:
            raise ValueError(f"--lora_target_modules names no layer: give some, such as q_proj v_proj, or {ALL_LINEAR}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.load_in_4bit and not self.use_lora:
            raise ValueError(
                "--load_in_4bit true needs --use_lora true: weights in 4 bits cannot train, only adapters on them can"
            )
        if not self.shard_base and not self.use_lora:
            raise ValueError("--shard_base false needs --use_lora true: without LoRA there is no frozen base")

    @property
    def lora_scale(self) -> float:
        """Factor of B A x; rsLoRA: arXiv 2312.03732."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)


class LoRALinear(nn.Linear):
    """y = W x + b + scale B A dropout(x), where W and b are the base layer's own and frozen.

    Once `merged`, W includes scale B A, and the adapter is not computed any more (`rm.hf.adapter.merge`).
    """

    def __init__(self, base: nn.Linear, settings: LoraSettings):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._parameters, self._buffers = dict(base._parameters), dict(base._buffers)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(settings.lora_r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, settings.lora_r, device=device))
        self.scale, self.dropout, self.merged = settings.lora_scale, settings.lora_dropout, False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        base = super().forward(x)
        if self.training and self.dropout > 0:
            # As F.dropout, but on every device the mask that is kept for the backward has one byte an element.
            x, _ = torch.native_dropout(x, self.dropout, True)
        low = F.linear(x, self.lora_A) * self.scale  # (T, r)
        return torch.addmm(base, low, self.lora_B.T)  # the sum is part of the product: no pass of its own


class LoRANF4Linear(LoRALinear, NF4Linear):
    """The same, where W is kept in four bits."""


def adapt(model: nn.Module, settings: LoraSettings, dtype: torch.dtype, trained: tuple[str, ...] = ()) -> None:
    """Freeze a model on the meta device, cast it to `dtype`, and adapt each layer that the settings name.

    With --load_in_4bit, the matrices of all layers are kept in four bits (`rm.model.nf4`), the others in `dtype`.

    Args:
        trained: names of submodules that are trained in full.
    """
    if settings.load_in_4bit:
        quantize_layers(model)
    linear = {name: layer for name, layer in model.layers.named_modules() if isinstance(layer, nn.Linear)}
    leaves = {name.rpartition(".")[2] for name in linear}
    targets = leaves if ALL_LINEAR in settings.lora_target_modules else set(settings.lora_target_modules)
    if unknown := sorted(targets - leaves):
        raise ValueError(
            f"--lora_target_modules {' '.join(unknown)}: no such linear layer; give some of "
            f"{', '.join(sorted(leaves))}, or {ALL_LINEAR}"
        )
    targeted = [layer for name, layer in linear.items() if name.rpartition(".")[2] in targets]
    narrowest = min(min(layer.in_features, layer.out_features) for layer in targeted)
    if settings.lora_r > narrowest:
        raise ValueError(
            f"--lora_r {settings.lora_r} is more than the {narrowest} features of a target layer: lower it"
        )
    for name, p in model.named_parameters():
        if name.partition(".")[0] not in (*model.fp32_modules, *trained):
            p.requires_grad_(False)
            p.data = p.data.to(dtype)
    for name, layer in linear.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            cls = LoRANF4Linear if isinstance(layer, NF4Linear) else LoRALinear
            setattr(model.layers.get_submodule(parent), leaf, cls(layer, settings))


def checkpointed(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds: all but the frozen base below adapters, which is loaded again."""
    parameters = dict(model.named_parameters())
    adapted = any(map(is_adapter, parameters))
    return {name: p for name, p in parameters.items() if p.requires_grad or not adapted}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def initial_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """An adapter's initial values: A uniform (Kaiming, a = sqrt(5)), B zero, so that B A is zero at first."""
    if name.endswith(".lora_B"):
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
