"""Two operations with a backward of their own, which saves fewer activations than autograd does.

Each saves only its inputs and recomputes what is cheap. `tests/model/test_ops.py` compares them with plain formulas.

Shapes: T tokens in a micro-batch (or tokens and heads: any leading dimensions), D width, F hidden width of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight (arXiv 1910.07467), the mean square in fp32. Saves x and one number per token."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square_() / x.shape[-1] + eps).rsqrt_()  # (T, 1) fp32
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale  # (T, D) fp32: rms 1
        unit_grad = grad_output * weight if ctx.needs_input_grad[0] else None
        weight_grad = (grad_output * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if unit_grad is None:
            return None, weight_grad, None
        unit_grad = unit_grad.to(unit.dtype)
        # (T, 1): the part of the gradient along x, which only rescales x and so does not change the output
        along = torch.linalg.vecdot(unit_grad, unit)[..., None] / x.shape[-1]
        return unit_grad.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), weight_grad, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202). Saves gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        gate, up = ctx.saved_tensors
        up_grad = F.silu(gate).mul_(grad_output)
        return torch.ops.aten.silu_backward(grad_output * up, gate), up_grad
