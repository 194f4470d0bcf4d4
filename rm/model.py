"""One Transformer for every family: a model is a `ModelConfig`, read from config.json by `rm.families`.

The model knows tokens, positions and an attention kernel. It does not know batches, losses, adapters, sharding or
files: those act on it from outside. All choices are made when it is built; `forward` has none but rope or not. It has
parameters only, no buffers, so a model made on the meta device and sharded has nothing to restore but what the
checkpoint holds.

Shapes: T tokens in a row, D width, H heads, K kv heads, E head width, F hidden width of the MLP, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rm.attention import Document, SplitAttention
from rm.lean import RMSNormFunction, SwiGLUFunction


@dataclass(frozen=True)
class ModelConfig:
    """The axes along which the families differ; nothing about training."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    head_dim: int
    hidden_dim: int
    norm: str  # a key of NORMS
    norm_eps: float
    mlp: str  # a key of MLPS
    positions: str  # "rope" or "learned"
    max_positions: int  # what the model was made for; a limit only where positions are learned
    rope_theta: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    attn_scale: float  # what q.k is multiplied with
    windows: tuple[int, ...]  # one per layer: how far back it sees, 0 = everything
    tie_embeddings: bool  # the LM head is the embedding

    @property
    def attention_cost(self) -> float:
        """FLOPs of one (query, key) pair in attention over one token's elsewhere: what the plan balances with."""
        heads = self.n_heads * self.head_dim
        projections = self.dim * (2 * heads + 2 * self.n_kv_heads * self.head_dim)
        matrices = projections + (3 if self.mlp == "swiglu" else 2) * self.dim * self.hidden_dim
        return 4 * heads / (2 * matrices)


def rope_table(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), in the half-rotation form of Hugging Face.

    The sines carry the sign of the rotation, so that `rotate` needs no negated half. Angles are taken in fp32
    whatever `dtype`.

    Args:
        position: (T,) place of each token in its own text.

    Returns:
        cos, sin: each (T, 1, E).
    """
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    )  # (E/2,)
    angle = position[:, None].float() * frequency  # (T, E/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None].to(dtype), torch.cat([-sin, sin], -1)[:, None].to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (T, H, E) turned by its position."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.RMSNorm):
    def __init__(self, config: ModelConfig):
        super().__init__(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def __init__(self, config: ModelConfig):
        super().__init__(config.dim, eps=config.norm_eps)


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


class TanhGELU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLPS = {"swiglu": SwiGLU, "gelu_tanh": TanhGELU}


class Attention(nn.Module):
    """q, k and v are separate everywhere, so that adapters and checkpoints can name them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim, self.scale, self.window = config.head_dim, config.attn_scale, config.windows[layer]
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.dim, bias=config.out_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attend) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)  # (T, H, E), (T, K, E)
        return self.o_proj(attend(q, k, v, window=self.window, scale=self.scale).flatten(1))  # (T, H, E) -> (T, D)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = NORMS[config.norm](config)
        self.attn = Attention(config, layer)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attend) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, attend)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens to hidden states; `rm.heads` puts a language-model or a reward head on top."""

    def __init__(self, config: ModelConfig, kernel: type = SplitAttention):
        super().__init__()
        self.config = config
        self.kernel = kernel  # a class of rm.attention: built once per row, called once per layer
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = NORMS[config.norm](config)

    def hidden(self, tokens: Tensor, position: Tensor, documents: list[Document]) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (T,) ids of one packed row.
            position: (T,) place of each token in its own text; a reply's positions continue its prefix's.
            documents: the row's documents, in order, as `rm.attention` describes them; their lengths sum to T.

        Returns:
            (T, D), in the dtype of the (gathered) parameters.
        """
        x, rope = self.embed(tokens), None  # (T, D)
        if self.config.positions == "learned":
            x = x + self.embed_positions(position)
        else:
            rope = rope_table(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        attend = self.kernel(documents, x.device)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)
