"""Attention whose logits are capped, softcap * tanh(q.k / softcap), as in Gemma 2: no fused kernel of torch has it.

Plain matrix products over a block of queries at a time. The backward computes a block's logits again, so that memory
holds those of one block, and never (L, S) of a text.

Shapes: L queries and S keys of one text, H heads, K kv heads, E head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 512  # queries at a time


def capped_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float) -> Tensor:
    """Causal attention of the last L of S positions.

    Args:
        q: (L, H, E)
        k, v: (S, K, E)
        window: how many positions a query sees, itself among them; 0: all before it.

    Returns:
        (L, H, E)
    """
    out = []
    for queries, keys in blocks(len(q), len(k), window):
        arguments = q[queries], k[keys], v[keys], window, scale, softcap
        out.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out)


def blocks(queries: int, keys: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of one block after another, the last of `keys` positions, and the keys that each block sees."""
    before = keys - queries
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        first = max(0, before + start - window + 1) if window else 0
        yield slice(start, stop), slice(first, before + stop)


def visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(L, S) bool: which keys each query sees, where the queries are the last L of S positions."""
    sees = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return sees.triu(keys - queries - window + 1) if window else sees


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float) -> Tensor:
    """`capped_attention` of one block, in at least fp32 between the two products."""
    length, heads, keys, kv_heads = *q.shape[:2], *k.shape[:2]
    grouped = q.transpose(0, 1).reshape(kv_heads, -1, q.shape[-1])  # (K, H/K * L, E): a kv head's queries
    logits = (grouped @ k.permute(1, 2, 0)).to(torch.promote_types(q.dtype, torch.float32))
    logits = softcap * torch.tanh(logits * (scale / softcap))
    sees = visible(length, keys, window, q.device)  # (L, S)
    logits = logits.view(heads, length, keys).masked_fill(~sees, float("-inf"))
    weights = logits.softmax(-1).to(v.dtype).view(kv_heads, -1, keys)
    return (weights @ v.transpose(0, 1)).view(heads, length, -1).transpose(0, 1)
