"""One Transformer for every family: a model is a `ModelConfig`, read from config.json by `rm.hf.families`.

The model knows tokens, positions and an attention kernel. It does not know batches, losses, adapters, sharding or
files: those act on it from outside. All choices are made when it is built, along the axes of `ModelConfig`. It has
parameters only, no buffers, so a model that was made on the meta device and sharded needs nothing but the checkpoint.

After the last layer's attention, positions no longer interact: only the positions that the head reads are gathered
before o_proj and the MLP. Of a pair, a reward model reads two.

Shapes: T tokens in a micro-batch, N output positions, D width, H heads, K kv heads, E head width, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rm.data.batch import Segment
from rm.model.attention import SplitAttention
from rm.model.feed_forward import MLPS
from rm.model.ops import RMSNormFunction
from rm.model.rotary import Rope, Tables, rope_tables, rotation

Positions = Tensor | slice  # (N,) indices into a micro-batch
ALL_POSITIONS = slice(None)


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
    mlp: str  # a key of `rm.model.feed_forward.MLPS`
    positions: str  # "rope" or "learned"
    max_positions: int  # that the model was trained for; a limit only where positions are learned
    ropes: tuple[Rope | None, ...]  # one per layer; None: no rotary positions
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    attn_scale: float  # factor of q.k
    windows: tuple[int, ...]  # sliding window of each layer; 0: it attends to everything
    tie_embeddings: bool  # the LM head is the embedding
    block: str = "serial"  # a key of BLOCKS
    qk_norm: str = "none"  # before rotary positions, of q and k: "head", each head's, or "all heads", together
    embed_scale: float = 1.0  # factor of the embeddings
    residual_scale: float = 1.0  # factor of what attention and MLP add; read by the block "scaled"
    attn_softcap: float = 0.0  # q.k, scaled, becomes softcap * tanh(q.k / softcap); 0: it stays
    logit_scale: float = 1.0  # factor of the language model's logits
    logit_softcap: float = 0.0  # as attn_softcap, of these logits
    score: str = "linear"  # a key of `rm.model.heads.SCORES`: a reward model's head
    long_ropes: tuple[Rope | None, ...] = ()  # in place of `ropes`, where texts may have more than long_beyond tokens
    long_beyond: int = 0

    @property
    def longest_text(self) -> int | None:
        """How many positions the model has; None: any number."""
        limits = [rope.longest for rope in self.ropes if rope is not None and rope.longest]
        return min([*limits, *([self.max_positions] if self.positions == "learned" else [])], default=None)

    def for_texts(self, max_length: int) -> "ModelConfig":
        """The config for texts of at most so many tokens, one for all of them: a reward is not to depend on others."""
        if self.long_ropes and max_length > self.long_beyond:
            return replace(self, ropes=self.long_ropes)
        return self

    @property
    def attention_cost(self) -> float:
        """FLOPs of one (query, key) pair in attention, in units of one token's FLOPs outside attention."""
        heads = self.n_heads * self.head_dim
        projections = self.dim * (2 * heads + 2 * self.n_kv_heads * self.head_dim)
        matrices = projections + MLPS[self.mlp].matrices * self.dim * self.hidden_dim
        return 4 * heads / (2 * matrices)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one fused kernel, which saves as little: six times as fast on an H200
            return super().forward(x)
        return RMSNormFunction.apply(x, self.weight, self.eps)


class OffsetRMSNorm(nn.RMSNorm):
    """Zero-centred RMSNorm: the scale is 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, 1 + self.weight.float(), self.eps)


class RMSNormOfHeads(RMSNorm):
    """One RMSNorm over all heads of q or k, (T, H, E), together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).view_as(x)


NORMS = {"rms": RMSNorm, "rms_offset": OffsetRMSNorm, "layer": nn.LayerNorm}


def _norm(config: ModelConfig, width: int) -> nn.Module:
    return NORMS[config.norm](width, eps=config.norm_eps)


def _qk_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm of q or k, `width` over all of its heads."""
    match config.qk_norm:
        case "none":
            return nn.Identity()
        case "head":
            return _norm(config, config.head_dim)
        case "all heads":
            return RMSNormOfHeads(width, eps=config.norm_eps)
    raise AssertionError(config.qk_norm)


class Attention(nn.Module):
    """q, k and v are separate layers in every family, so that adapters and checkpoints can name them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim, self.scale, self.window = config.head_dim, config.attn_scale, config.windows[layer]
        self.softcap = config.attn_softcap
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.dim, bias=config.out_bias)
        self.q_norm, self.k_norm = _qk_norm(config, heads), _qk_norm(config, kv_heads)
        self.rotate = rotation(config.ropes[layer], config.head_dim)

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(self.q_norm(q), rope.q), self.rotate(self.k_norm(k), rope.k)  # (T, H, E), (T, K, E)
        attended = attend(q, k, v, window=self.window, scale=self.scale, softcap=self.softcap)  # (T, H, E)
        return self.o_proj(attended[output_positions].flatten(1))  # (N, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): the pre-norm block."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = _norm(config, config.dim)
        self.attn = Attention(config, layer)
        self.mlp_norm = _norm(config, config.dim)
        self.mlp = MLPS[config.mlp](config.dim, config.hidden_dim, config.mlp_bias)

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        x = x[output_positions] + self.attn(self.attn_norm(x), rope, attend, output_positions)
        return x + self.mlp(self.mlp_norm(x))


class ParallelBlock(Block):
    """x + attention(norm(x)) + MLP(other_norm(x))."""

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        residual = x[output_positions]
        attended = self.attn(self.attn_norm(x), rope, attend, output_positions)
        return residual + attended + self.mlp(self.mlp_norm(residual))


class SandwichBlock(Block):
    """Attention and MLP, each with a norm before and a norm after it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.attn_post_norm = _norm(config, config.dim)
        self.mlp_post_norm = _norm(config, config.dim)

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        x = x[output_positions] + self.attn_post_norm(self.attn(self.attn_norm(x), rope, attend, output_positions))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class PostNormBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(MLP(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.attn_post_norm = _norm(config, config.dim)
        self.mlp = MLPS[config.mlp](config.dim, config.hidden_dim, config.mlp_bias)
        self.mlp_post_norm = _norm(config, config.dim)

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        x = x[output_positions] + self.attn_post_norm(self.attn(x, rope, attend, output_positions))
        return x + self.mlp_post_norm(self.mlp(x))


class ScaledBlock(Block):
    """The pre-norm block, whose attention and MLP are multiplied by a factor."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, rope: Tables, attend, output_positions: Positions) -> Tensor:
        attended = self.attn(self.attn_norm(x), rope, attend, output_positions)
        x = torch.add(x[output_positions], attended, alpha=self.scale)
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.scale)


BLOCKS = {
    "serial": Block,
    "parallel": ParallelBlock,
    "post-norm": PostNormBlock,
    "sandwich": SandwichBlock,
    "scaled": ScaledBlock,
}


class ScaledEmbedding(nn.Embedding):
    """An embedding whose output is multiplied by a factor, in the dtype of the weights. A tied head is not scaled."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.dim)
        self.scale = config.embed_scale

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu").item()


class Transformer(nn.Module):
    """Tokens to hidden states; `rm.model.heads` adds a language-model or a reward head.

    Attributes:
        compute_dtype: what the model computes in, except `fp32_modules`; its master weights may be float32.
        kernel: a class of `rm.model.attention`: built once per micro-batch, called once per layer.
        memory_device: where its parameters are kept; None: on this process's device.
        fp32_modules: names of the submodules that compute, and are trained and saved, in float32 and in full,
            whatever the others do: a reward model's score head.
        training_modules: names of the submodules that only a training has: they are not saved with the model.
        forward_methods: names of the methods besides `forward` that run a forward pass, which sharding has to know.
    """

    fp32_modules: tuple[str, ...] = ()
    training_modules: tuple[str, ...] = ()
    forward_methods: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, kernel: type = SplitAttention):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.kernel = kernel
        self.memory_device: torch.device | None = None
        scaled = config.embed_scale != 1
        self.embed = ScaledEmbedding(config) if scaled else nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.dim)
        self.layers = nn.ModuleList(BLOCKS[config.block](config, i) for i in range(config.n_layers))
        self.norm = _norm(config, config.dim)

    def hidden(
        self, tokens: Tensor, position: Tensor, segments: list[Segment], output_positions: Positions = ALL_POSITIONS
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (T,) ids of one packed micro-batch.
            position: (T,) of each token in its own text; a reply's positions continue its prompt's.
            segments: in order, as `rm.model.attention` describes them; their lengths sum to T.
            output_positions: (N,) indices of the tokens whose states are returned.

        Returns:
            (N, D), in the dtype of the (gathered) parameters.
        """
        x = self.embed(tokens)  # (T, D)
        if self.config.positions == "learned":
            x = x + self.embed_positions(position)
        tables = {rope: rope_tables(position, rope, x.dtype) for rope in set(self.config.ropes)}
        attend = self.kernel(segments, x.device)
        for layer, rope in zip(self.layers, self.config.ropes, strict=True):
            is_last = layer is self.layers[-1]
            x = layer(x, tables[rope], attend, output_positions if is_last else ALL_POSITIONS)
        return self.norm(x)  # (N, D)
