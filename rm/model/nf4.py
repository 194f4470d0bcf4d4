"""The frozen base below adapters in four bits (QLoRA, arXiv 2305.14314): NF4 with double quantization.

A matrix is cut into blocks of 64 values. Each value is one of 16 codes, the quantiles of a normal distribution, times
the largest magnitude of its block; that one is kept in 8 bits, less their mean, times the largest of 256 of them. This
takes 4.13 bits a value. Codes, order of the bits and arithmetic are those of bitsandbytes.

A layer is dequantized where its product is computed, in the forward and again in the backward, and never kept. What is
quantized are buffers, which FSDP2 leaves whole on every process, so that the bits do not depend on their number.

Shapes: O and I a layer's outputs and inputs, N = O I, T tokens in a micro-batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # values with a scale of their own
SCALE_BLOCK = 256  # scales with a scale of their own
AT_ONCE = 2**24  # values that are quantized or dequantized at a time: whole blocks of both kinds
# The paper's appendix E.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(NamedTuple):
    """A matrix in four bits."""

    packed: Tensor  # (ceil(N / 64) * 32,) uint8: two codes each, the first in the high bits
    scale_codes: Tensor  # (ceil(N / 64),) uint8
    scale_scales: Tensor  # (ceil(N / 64 / 256),) float32
    mean: Tensor  # () float32, of the scales
    pairs: Tensor  # (256, 2) float32, what each byte of `packed` stands for; here so that it is on the device
    scale_values: Tensor  # (256,) float32, what each of `scale_codes` stands for


def _scale_values() -> Tensor:
    """The "dynamic" data type of arXiv 1511.04561, as bitsandbytes has it: sign, exponent in unary, and a fraction in
    the bits that are left.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([*positive, *(-x for x in positive), 0.0, 1.0]))


def _normalized(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of `size` values, (N / size, size), over the largest magnitude of each, (N / size,)."""
    blocks = F.pad(x, (0, -len(x) % size)).view(-1, size)
    scales = blocks.abs().amax(1)
    return blocks * (1 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None], scales


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """(N,) uint8 indices of those of the ascending `values` that are nearest to x."""
    return torch.bucketize(x.flatten(), (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def quantize(weight: Tensor) -> Quantized:
    """A matrix, (O, I) of any floating dtype, in four bits, on its device."""
    values, scale_values = torch.tensor(VALUES, device=weight.device), _scale_values().to(weight.device)
    packed, scales = [], []
    for part in weight.reshape(-1).split(AT_ONCE):
        blocks, largest = _normalized(part.float(), BLOCK)
        codes = _nearest(blocks, values)
        packed.append(codes[::2] << 4 | codes[1::2])
        scales.append(largest)
    scale = torch.cat(scales)
    mean = scale.mean()
    blocks, scale_scales = _normalized(scale - mean, SCALE_BLOCK)
    scale_codes = _nearest(blocks, scale_values)[: len(scale)]
    pairs = torch.cartesian_prod(values, values)
    return Quantized(torch.cat(packed), scale_codes, scale_scales, mean, pairs, scale_values)


def dequantize(stored: Quantized, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix, (O, I), computed in float32 and rounded once."""
    packed, scale_codes, scale_scales, mean, pairs, scale_values = stored
    scale = scale_values[scale_codes.int()] * scale_scales.repeat_interleave(SCALE_BLOCK)[: len(scale_codes)] + mean
    weight = torch.empty(2 * len(packed), dtype=dtype, device=packed.device)
    parts = packed.split(AT_ONCE // 2), scale.split(AT_ONCE // BLOCK), weight.split(AT_ONCE)
    for codes, scales, out in zip(*parts, strict=True):
        out.view(-1, BLOCK).copy_(pairs[codes.int()].view(-1, BLOCK).mul_(scales[:, None]))
    return weight[: math.prod(shape)].view(shape)


class _Product(torch.autograd.Function):
    """x W^T for a frozen W. Saves neither x nor W: the quantized matrix is there as long as the layer."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        # On the context itself: what is saved for the backward may be offloaded, and these are no activations.
        ctx.stored, ctx.shape = Quantized(*stored), shape
        return F.linear(x, dequantize(ctx.stored, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        weight = dequantize(ctx.stored, ctx.shape, grad_output.dtype)
        return grad_output @ weight, None, *(None for _ in ctx.stored)


class NF4Linear(nn.Linear):
    """A frozen linear layer whose matrix is kept in four bits; its bias, if it has one, stays as it is."""

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("bias", base.bias)
        n_blocks = math.ceil(self.in_features * self.out_features / BLOCK)
        sizes = (n_blocks * BLOCK // 2,), (n_blocks,), (math.ceil(n_blocks / SCALE_BLOCK),), (), (256, 2), (256,)
        for name, size in zip(Quantized._fields, sizes, strict=True):
            dtype = torch.uint8 if name in ("packed", "scale_codes") else torch.float32
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=base.weight.device))

    @property
    def stored(self) -> Quantized:
        return Quantized(*(getattr(self, name) for name in Quantized._fields))

    @property
    def weight(self) -> Tensor:
        """(O, I) float32, dequantized anew each time."""
        return dequantize(self.stored, (self.out_features, self.in_features), torch.float32)

    def empty(self) -> Tensor:
        """(O, I) float32 on the layer's device, to be filled with the values that `fill` quantizes."""
        return torch.empty(self.out_features, self.in_features, device=self.packed.device)

    def fill(self, weight: Tensor) -> None:
        """Quantize (O, I) into the layer's memory."""
        for buffer, values in zip(self.stored, quantize(weight), strict=True):
            buffer.copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x, (self.out_features, self.in_features), *self.stored)
        return product if self.bias is None else product + self.bias


def quantize_layers(model: nn.Module) -> None:
    """Have each linear layer of a model's blocks, on the meta device, keep its matrix in four bits."""
    for name, layer in list(model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.layers.get_submodule(parent), leaf, NF4Linear(layer))


def quantized_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """Name of the matrix -> the layer that keeps it in four bits."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def count_parameters(model: nn.Module) -> int:
    """The parameters of a model, with those in four bits."""
    in_four_bits = sum(layer.in_features * layer.out_features for layer in quantized_layers(model).values())
    return in_four_bits + sum(p.numel() for p in model.parameters())
