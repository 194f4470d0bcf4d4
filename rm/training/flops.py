"""Operations of training, and the share of a device's peak that they reach (MFU, arXiv 2204.02311, appendix B).

Operations are those that the model needs: 6 for each token and each weight that trains (2 in the forward, 2 for the
gradient of the input, 2 for that of the weight), 4 for one that is frozen, and those of attention. Recomputation does
not count, though it takes time.
"""

import re

import torch
from torch import nn

from rm.data.batch import Loader
from rm.distributed import process_group as dist
from rm.model.nf4 import count_parameters

# Dense bfloat16 with accumulation in float32, in 10^12 operations per second, from the makers' data sheets.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
SLOWER = {"MIG", "Laptop", "D", "Ti"}  # words in the names of devices with another peak


def peak_flops(device_name: str) -> float | None:
    """Operations per second of a GPU in bfloat16, as torch names it ("NVIDIA A100-SXM4-80GB"); None if unknown."""
    words = set(re.split("[ -]", device_name))
    if words & SLOWER:
        return None
    return next((peak * 1e12 for name, peak in PEAKS.items() if set(name.split()) <= words), None)


def utilization(model: nn.Module, loader: Loader, tokens_per_second: float) -> float | None:
    """The share of the peak of all devices; None where it is not known, and in float32.

    Args:
        tokens_per_second: over all processes; as many operations are counted for each as in the mean of the epoch.
    """
    peak = peak_flops(dist.device_name()) if dist.device().type == "cuda" else None
    if peak is None or model.compute_dtype != torch.bfloat16:
        return None
    per_token = step_flops(model, loader) * loader.steps_per_epoch / float(loader.lengths.sum())
    return tokens_per_second * per_token / (peak * dist.world_size())


def step_flops(model: nn.Module, loader: Loader, gradient_checkpointing: str = "none") -> float:
    """Operations of a mean step over all processes, with those of the given recomputation.

    A product with a matrix of n entries takes 2n operations per token in the forward, 2n for the gradient of its input,
    and 2n for the gradient of the matrix where it trains. Attention's backward takes twice its forward. After the last
    layer's attention only the positions that the head reads are computed.
    """
    passes = 2 + (1 if gradient_checkpointing == "full" else 0)

    def products(*modules: nn.Module) -> int:
        matrices = [p for module in modules for p in module.parameters() if p.ndim == 2]
        in_4bit = sum(count_parameters(module) - sum(p.numel() for p in module.parameters()) for module in modules)
        return 2 * (passes * in_4bit + sum(p.numel() * (passes + p.requires_grad) for p in matrices))

    after_attention = products(model.layers[-1].attn.o_proj, model.layers[-1].mlp)
    flops = loader.lengths.sum() * (products(model.layers) - after_attention)
    if model.head == "reward":
        flops += loader.groups.replies.sum() * after_attention
    if model.predicts_tokens:
        head = model.head_weight
        flops += loader.labels.sum() * (after_attention + 2 * head.numel() * (2 + head.requires_grad))
    return float(flops) / loader.steps_per_epoch + attention_flops(model, loader, gradient_checkpointing)


def attention_flops(model: nn.Module, loader: Loader, gradient_checkpointing: str = "none") -> float:
    """Those of `step_flops` that are attention's."""
    passes = 3 + (1 if gradient_checkpointing == "full" else 0)
    per_token = sum(x.in_features * x.out_features for x in model.layers.modules() if isinstance(x, nn.Linear))
    costs = loader.costs.sum() - loader.lengths.sum()
    return float(2 * costs * passes * per_token) / loader.steps_per_epoch
