"""Who sees whom in a packed row, and the kernels that obey it.

A row is documents laid end to end. A document is a prefix and its replies: `(P, R1, ..., RK)` tokens. Packing,
prefix sharing and the absence of padding are all one rule, the *rule of sight*:

    q sees k  iff  k is not later in the row, both are of one document, k lies in the prefix or in q's own reply,
                   and, in a layer with a window w, position_q - position_k < w.

       prefix    reply 1   reply 2
    P  x . . .                          Every reply continues the prefix's positions and never sees another
       x x . .                          reply: K full texts cost one prefix, and nothing is approximated.
    R1 x x x . . .
       x x x x . .
    R2 x x . . x .
       x x . . x x

A kernel is built once per forward from the row's documents and then called by every layer. Kernels share a
signature and are checked against the rule, written out entry by entry, in `tests/reference.py`.

Shapes: T tokens in a row, H heads, K kv heads, E head width, L queries and S keys of one call.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from rm.data.batch import Segment

ANYWHERE = 0  # the window of a layer that sees the whole document


class SplitAttention:
    """Plain SDPA, one call a reply: causal over [P R1], then each further reply over [P Ri].

    Works on every device and dtype. On CPU it reaches the whole saving in tokens, where one dense (T, T) mask
    reaches half of it.
    """

    def __init__(self, segments: list[Segment], device: torch.device):
        self.segments = segments
        self.device = device
        self.pieces = [n for prefix, first, *others in segments for n in (prefix + first, *others)]
        self.masks: dict[tuple[int, int, int], Tensor | None] = {}

    @torch.compiler.disable  # the pieces differ from row to row: tracing them would compile every row anew
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        dtype = q.dtype
        if dtype == torch.bfloat16 and self.device.type == "cpu":  # where SDPA's backward then takes twice as long
            q, k, v = q.float(), k.float(), v.float()
        queries, keys, values = (iter(x.split(self.pieces)) for x in (q, k, v))
        out = []
        for prefix, _, *others in self.segments:
            key, value = next(keys), next(values)
            out.append(self._attend(next(queries), key, value, window, scale))
            for _ in others:
                path = (torch.cat([shared[:prefix], next(own)]) for shared, own in ((key, keys), (value, values)))
                out.append(self._attend(next(queries), *path, window, scale))
        return torch.cat(out).to(dtype)  # (T, H, E)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """The last L positions of a path of S attend to it: q (L, H, E), k and v (S, K, E) -> (L, H, E)."""
        mask = self._mask(len(q), len(k), window)
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),  # (1, H | K, L | S, E)
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    def _mask(self, queries: int, keys: int, window: int) -> Tensor | None:
        """(L, S) bool, causal aligned at the end of the path; None where SDPA's own causal flag says the same."""
        if queries == keys and (window == ANYWHERE or keys <= window):
            return None
        where = (queries, keys, window)
        if where not in self.masks:  # one mask serves all layers
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            self.masks[where] = mask.triu(keys - queries - window + 1) if window else mask
        return self.masks[where]


class VarlenAttention:
    """One FlashAttention call a layer (CUDA, 16 bit): K and V gathered as [P R1 P R2 ...].

    Query sequences are [P R1], [R2], ..., key sequences [P R1], [P R2], ...: FlashAttention aligns a causal
    mask of unequal lengths at the bottom right, which is the rule of sight. The gather is slices and `cat`,
    whose backward is deterministic.
    """

    def __init__(self, segments: list[Segment], device: torch.device):
        from torch.nn.attention.varlen import varlen_attn  # here and not above: only CUDA builds can call it

        self.varlen_attn = varlen_attn
        self.segments = segments
        self.pieces = [n for prefix, first, *others in segments for n in (prefix + first, *others)]
        paths = [prefix + reply for prefix, *replies in segments for reply in replies]
        self.cu_queries, self.longest_query = _cumulative(self.pieces, device), max(self.pieces)
        self.cu_keys, self.longest_key = _cumulative(paths, device), max(paths)

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        return self.varlen_attn(
            q,
            self._gather(k),
            self._gather(v),
            self.cu_queries,
            self.cu_keys,
            self.longest_query,
            self.longest_key,
            scale=scale,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _gather(self, x: Tensor) -> Tensor:
        """(T, K, E) as stored -> the paths one after another, each with its own copy of the prefix."""
        pieces, out = iter(x.split(self.pieces)), []
        for prefix, _, *others in self.segments:
            first = next(pieces)
            out.append(first)
            for _ in others:
                out += [first[:prefix], next(pieces)]
        return torch.cat(out)


def choose_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> type:
    """The fastest kernel that is right here: varlen only after it agreed with split on a small random row."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return SplitAttention
    try:
        gap = _disagreement(device, dtype, heads, kv_heads, head_dim)
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        logging.getLogger("rm").warning("attention: split, since varlen does not run here: %s", error)
        return SplitAttention
    kernel = VarlenAttention if gap < 0.02 else SplitAttention
    logging.getLogger("rm").info("attention: %s (largest relative gap of varlen to split %.1e)", kernel.__name__, gap)
    return kernel


def _disagreement(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> float:
    """Largest relative gap between varlen and split, in outputs and gradients, windows and none, 1 to 3 replies."""
    segments = [(7, 5, 9), (0, 33), (20, 4, 6, 11)]
    tokens = sum(map(sum, segments))
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.randn(tokens, n, head_dim, device=device, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]
    gaps = []
    for window in (ANYWHERE, 8):
        results = []
        for kernel in (SplitAttention, VarlenAttention):
            leaves = [x.clone().requires_grad_() for x in made]
            out = kernel(segments, device)(*leaves, window=window, scale=head_dim**-0.5)
            out.float().square().sum().backward()
            results.append([out.detach(), *(x.grad for x in leaves)])
        gaps += [((a - b).abs().max() / b.abs().max()).item() for b, a in zip(*results, strict=True)]
    return max(gaps)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """[0, l1, l1 + l2, ...] as FlashAttention wants it, (len + 1,) int32."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)
