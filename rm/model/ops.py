"""Two operations whose own backward keeps fewer activations than autograd's does.

Each keeps its inputs alone and recomputes what is cheap. `tests/test_lean.py` holds them to the plain formulas.

Shapes: T tokens in a row (or tokens and heads: any leading dimensions), D width, F hidden width of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight (arXiv 1910.07467), the mean square in fp32 whatever x is. Keeps x and one number a token."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_() / x.shape[-1] + eps).rsqrt_()  # (T, 1) fp32
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale  # (T, D) fp32: rms 1
        slope = upstream * weight if ctx.needs_input_grad[0] else None
        weight_grad = (upstream * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if slope is None:
            return None, weight_grad, None
        slope = slope.to(unit.dtype)
        along = torch.linalg.vecdot(slope, unit)[..., None] / x.shape[-1]  # (T, 1): the part that only rescales x
        return slope.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), weight_grad, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202). Keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gate, up = ctx.saved_tensors
        up_grad = F.silu(gate).mul_(upstream)
        return torch.ops.aten.silu_backward(upstream * up, gate), up_grad
