"""Tiny models and examples that the tests make in memory."""

import numpy as np
import torch

from rm.data.examples import Example, Examples
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.model.transformer import ModelConfig, Rope

LLAMA = ModelConfig(
    vocab_size=61, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48,
    norm="rms", norm_eps=1e-5, mlp="swiglu", positions="rope", max_positions=512,
    ropes=(Rope((1.0, 0.1, 0.01, 0.001)),) * 3,
    qkv_bias=False, out_bias=False, mlp_bias=False, attn_scale=8**-0.5, windows=(0, 0, 0), tie_embeddings=False,
)  # fmt: skip
GPT_NEO = ModelConfig(
    vocab_size=61, dim=32, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=8, hidden_dim=64,
    norm="layer", norm_eps=1e-5, mlp="gelu_tanh", positions="learned", max_positions=128, ropes=(None,) * 4,
    qkv_bias=False, out_bias=True, mlp_bias=True, attn_scale=1.0, windows=(0, 6, 0, 6), tie_embeddings=True,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "gpt_neo": GPT_NEO}


def model(
    cls: type[LanguageModel] | type[RewardModel],
    config: ModelConfig = LLAMA,
    kernel: type = SplitAttention,
    seed: int = 0,
):
    """A plain (unsharded) fp32 model with random weights, the same for a seed."""
    torch.manual_seed(seed)
    plain = cls(config, kernel)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else 1 + 0.1 * torch.randn_like(p))
    return plain


def token_pairs(n: int, seed: int = 0, vocab: int = 61, longest: int = 14) -> list[tuple[list[int], list[int]]]:
    """Pairs of full texts that share a prompt of random length, which may be empty."""
    random = np.random.default_rng(seed)

    def ids(shortest: int) -> list[int]:
        return random.integers(0, vocab, random.integers(shortest, longest)).tolist()

    prompts = [ids(0) for _ in range(n)]
    return [(prompt + ids(1), prompt + ids(1)) for prompt in prompts]


def token_rankings(n: int, seed: int = 0) -> tuple[list[list[list[int]]], list[list[float]]]:
    """Full texts of 2 to 5 replies that share a prompt, and their grades, of which some are equal."""
    random = np.random.default_rng([seed, n])
    rankings, grades = [], []
    for (prompt, _), k in zip(token_pairs(n, seed), random.integers(2, 6, n), strict=True):
        rankings.append([prompt + random.integers(0, 61, random.integers(1, 6)).tolist() for _ in range(k)])
        grades.append(random.integers(0, 4, k).astype(float).tolist())
    return rankings, grades


def pair_examples(pairs) -> Examples:
    """Preference pairs from full texts as `rm.data.dataset` makes them: the common prefix is stored once."""
    return Examples.build(_example(pair) for pair in pairs)


def ranking_examples(rankings, grades) -> Examples:
    """`pair_examples` of any number of full texts per prompt, with a grade for each."""
    return Examples.build(_example(texts, np.array(grade)) for texts, grade in zip(rankings, grades, strict=True))


def text_examples(texts) -> Examples:
    """Texts for SFT, with loss on every token but the first."""
    return Examples.build(
        Example(np.zeros(0, np.int32), (np.array(t, np.int32),), (np.ones(len(t), bool),)) for t in texts
    )


def _example(texts, grade: np.ndarray | None = None) -> Example:
    shared = min(map(len, texts)) - 1
    while any(text[:shared] != texts[0][:shared] for text in texts):
        shared -= 1
    replies = tuple(np.array(text[shared:], np.int32) for text in texts)
    prefix = np.array(texts[0][:shared], np.int32)
    return Example(prefix, replies, tuple(np.zeros(len(r), bool) for r in replies), grade)
