"""The feed-forward layers, which a block applies to every position alone: `MLPS[name](dim, hidden_dim, bias)`.

Shapes: T tokens in a micro-batch, D width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from rm.model.ops import SwiGLUFunction


class GatedMLP(nn.Module):
    """down(act(gate) * up), arXiv 2002.05202."""

    matrices = 3

    def __init__(self, dim: int, hidden_dim: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)


class SwiGLU(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)"""
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


class GeGLU(GatedMLP):
    approximate = "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate=self.approximate) * self.up_proj(x))


class TanhGeGLU(GeGLU):
    approximate = "tanh"


class MLP(nn.Module):
    """down(act(up))"""

    matrices = 2
    activation: Callable[[Tensor], Tensor]

    def __init__(self, dim: int, hidden_dim: int, bias: bool):
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class GELU(MLP):
    activation = staticmethod(F.gelu)


class TanhGELU(MLP):
    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ReLU(MLP):
    activation = staticmethod(F.relu)


class SiLU(MLP):
    activation = staticmethod(F.silu)


MLPS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": TanhGeGLU,
    "gelu": GELU,
    "gelu_tanh": TanhGELU,
    "relu": ReLU,
    "silu": SiLU,
}
