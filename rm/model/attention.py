"""Attention over packed micro-batches: the mask, and the kernels that compute it.

A micro-batch is segments laid end to end. A segment is a prompt and its replies: `(P, R1, ..., RK)` tokens. Packing,
prefix sharing and the absence of padding are one causal mask:

    query q attends to key k  if  k is not later in the micro-batch, both are in one segment, k is in the prompt or in
                                  q's own reply, and, in a layer with a sliding window w, position_q - position_k < w.

       prompt    reply 1   reply 2
    P  x . . .                          Every reply continues the prompt's positions and never attends to another
       x x . .                          reply: K full texts cost one prompt, and nothing is approximated.
    R1 x x x . . .
       x x x x . .
    R2 x x . . x .
       x x . . x x

A kernel is built once per forward from the micro-batch's segments and then called by every layer. All kernels have the
same signature, and `compiles` says whether torch.compile may trace them. They are tested against the mask, written out
entry by entry, in `tests/reference.py`.

Shapes: T tokens in a micro-batch, H heads, K kv heads, E head width, L queries and S keys of one call.
"""

import contextlib
import importlib.util
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rm.data.batch import Segment
from rm.model import capped_attention as capped

# On a GPU, without cuDNN: it makes a plan for every new pair of lengths, 4 s for a layer of 44 replies on an H200.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

NO_WINDOW = 0  # the sliding window of a layer that attends to the whole segment


class SplitAttention:
    """Plain scaled_dot_product_attention, one call a reply: causal over [P R1], then each further reply over [P Ri].

    Works on every device and dtype, and with capped logits (`rm.model.capped_attention`). On a CPU it saves all of the
    shared prompt's computation, where one dense (T, T) mask would save half of it.
    """

    compiles = False  # its loop over segments differs in every micro-batch: torch.compile would trace each one anew

    def __init__(self, segments: list[Segment], device: torch.device):
        self.segments = segments
        self.device = device
        self.query_lengths = _query_lengths(segments)
        self.longest_query = max(self.query_lengths)
        self.longest_key = max(prefix + reply for prefix, *replies in segments for reply in replies)
        self.masks: dict[int, Tensor] = {}  # window -> the mask of the largest block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float = 0.0) -> Tensor:
        """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        dtype = q.dtype
        # On a CPU the backward of SDPA takes twice as long in bfloat16 as in float32.
        if dtype == torch.bfloat16 and self.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        queries, keys, values = (x.split(self.query_lengths) for x in (q, k, v))
        out, n = [], 0  # n counts the pieces [P R1], R2, ..., RK of all segments
        for prefix, _, *others in self.segments:
            first_key, first_value = keys[n], values[n]  # of [P R1]
            out.append(self._attend(queries[n], first_key, first_value, window, scale, softcap))
            n += 1
            for _ in others:
                key = torch.cat([first_key[:prefix], keys[n]])
                value = torch.cat([first_value[:prefix], values[n]])
                out.append(self._attend(queries[n], key, value, window, scale, softcap))
                n += 1
        return torch.cat(out).to(dtype)  # (T, H, E)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float) -> Tensor:
        """q (L, H, E), k and v (S, K, E) -> (L, H, E): queries are the last L of S positions (bottom-right causal)."""
        if softcap:
            return capped.capped_attention(q, k, v, window, scale, softcap)
        if len(q) == len(k) and (window == NO_WINDOW or len(k) <= window):  # SDPA's own causal flag means the same
            return self._product(q, k, v, None, scale)
        # A block of queries at a time: the mask of a long text would be larger than everything else.
        out = []
        for rows, keys in capped.blocks(len(q), len(k), window):
            block = _rows(q, rows), _rows(k, keys), _rows(v, keys)
            out.append(self._product(*block, self._mask(*map(len, block[:2]), window, q.dtype), scale))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`mask` (L, S), of q's dtype: what is added to the logits; None: causal."""
        with sdpa_kernel(_BACKENDS) if q.is_cuda else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),  # (1, H | K, L | S, E)
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out[0].transpose(0, 1)

    def needs_mask(self, window: int) -> bool:
        """Whether a layer with this window has to add a mask to the logits of some reply."""
        after_a_prompt = any(prefix and others for prefix, _, *others in self.segments)
        return after_a_prompt or (window != NO_WINDOW and self.longest_key > window)

    def _mask(self, queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
        """(L, S) of a block: 0 where a query sees a key, else -inf; bottom-right causal.

        Counted from there, all blocks have the same mask: theirs are views of the largest one, for all layers. Not of
        bools, of which SDPA makes a tensor of q's dtype in each layer, and keeps it for the backward.
        """
        if window not in self.masks:
            rows = min(capped.BLOCK, self.longest_query)
            columns = min(self.longest_key, rows + window - 1) if window else self.longest_key
            sees = capped.visible(rows, columns, window, self.device)
            self.masks[window] = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, float("-inf"))
        mask = self.masks[window][-queries:, -keys:]
        return mask.contiguous() if mask.is_cuda else mask  # CUDA's kernels need aligned rows


def _rows(x: Tensor, rows: slice) -> Tensor:
    """`x[rows]`, without an operation where these are all."""
    return x if rows == slice(0, len(x)) else x[rows]


class VarlenAttention:
    """One FlashAttention call a layer (CUDA, 16 bit), with keys and values gathered as [P R1 P R2 ...].

    Query sequences are [P R1], [R2], ..., key sequences [P R1], [P R2], ...: where their lengths differ, FlashAttention
    aligns the causal mask at the bottom right, which is this module's mask.
    """

    compiles = True

    def __init__(self, segments: list[Segment], device: torch.device):
        from torch.nn.attention.varlen import varlen_attn  # only CUDA builds can call it

        self.varlen_attn = varlen_attn
        query_lengths = _query_lengths(segments)
        key_lengths = [prefix + reply for prefix, *replies in segments for reply in replies]
        self.query_ends, self.longest_query = _cumulative(query_lengths, device), max(query_lengths)
        self.key_ends, self.longest_key = _cumulative(key_lengths, device), max(key_lengths)
        self.key_copies = _key_copies(segments, device) if len(key_lengths) > len(segments) else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float = 0.0) -> Tensor:
        """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        assert not softcap  # `choose_kernel` knows
        return self.varlen_attn(
            q,
            self._gather(k),
            self._gather(v),
            self.query_ends,
            self.key_ends,
            self.longest_query,
            self.longest_key,
            scale=scale,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _gather(self, x: Tensor) -> Tensor:
        """(T, K, E) as packed -> (S, K, E): the key sequences one after another, each with a copy of its prompt."""
        if self.key_copies is None:
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return _GatherKeys.apply(x, *self.key_copies)
        # Not by the function below, on which torch.compile of torch 2.11 fails where there is no gradient.
        return x.index_select(0, self.key_copies[0])


class _GatherKeys(torch.autograd.Function):
    """The gather of `VarlenAttention`, with a backward of its own.

    The gradient of a prompt's token is the sum over its copies. It is added one reply at a time, so that no
    `index_add_` has an index twice: then the sum has a fixed order also on a GPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token_of_key: Tensor, own_key: Tensor, *copies: Tensor) -> Tensor:
        """The indices are those of `_key_copies`."""
        ctx.save_for_backward(own_key, *copies)
        return x.index_select(0, token_of_key)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        own_key, *copies = ctx.saved_tensors
        grad = grad_output.index_select(0, own_key)
        for tokens, keys in zip(copies[::2], copies[1::2], strict=True):
            grad.index_add_(0, tokens, grad_output.index_select(0, keys))
        return grad, None, None, *(None for _ in copies)


def _key_copies(segments: list[Segment], device: torch.device) -> list[Tensor]:
    """Indices between the T tokens of a micro-batch and the S keys of its key sequences [P R1], [P R2], ...

    Returns:
        `token_of_key` (S,); `own_key` (T,), the first key of each token; then, for the 2nd, 3rd, ... replies of all
        segments, the prompts' tokens and the keys that are their copies, two tensors of equal length.
    """
    token_of_key, own_key = [], []
    copies: list[tuple[list[np.ndarray], list[np.ndarray]]] = []  # (tokens, keys) of the 2nd, 3rd, ... replies
    token = key = 0  # where the next piece begins
    for prefix, first, *others in segments:
        prompt = np.arange(token, token + prefix)
        token_of_key.append(np.arange(token, token + prefix + first))
        own_key.append(np.arange(key, key + prefix + first))
        token, key = token + prefix + first, key + prefix + first
        for n, reply in enumerate(others):
            token_of_key += [prompt, np.arange(token, token + reply)]
            own_key.append(np.arange(key + prefix, key + prefix + reply))
            if n == len(copies):
                copies.append(([], []))
            tokens, keys = copies[n]
            tokens.append(prompt)
            keys.append(np.arange(key, key + prefix))
            token, key = token + reply, key + prefix + reply
    indices = [token_of_key, own_key, *(part for pair in copies for part in pair)]
    return [_to_device(torch.from_numpy(np.concatenate(x)), device) for x in indices]


def _query_lengths(segments: list[Segment]) -> list[int]:
    """The lengths of the pieces [P R1], R2, ..., RK of all segments; they sum to T."""
    return [n for prefix, first, *others in segments for n in (prefix + first, *others)]


MAX_DISAGREEMENT = 0.02  # of two kernels in 16 bit, relative: an honest one is below 0.01


def choose_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, softcap: float = 0.0
) -> type:
    """The fastest kernel that is right here: varlen only after it agreed with split on a small random micro-batch.

    Varlen runs on FlashAttention 3 where its package is installed on a Hopper GPU, else on torch's FlashAttention 2.
    Neither caps q.k as torch calls them.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or softcap:
        return SplitAttention
    for version in _flash_attention_versions(device):
        try:
            _activate_flash_attention(version)
            gap = _disagreement(device, dtype, heads, kv_heads, head_dim)
        except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
            problem = f"VarlenAttention does not run here with FlashAttention {version}: {error}"
        else:
            if gap < MAX_DISAGREEMENT:
                return VarlenAttention
            problem = f"VarlenAttention with FlashAttention {version} differs from SplitAttention by {gap:.1e}"
        logging.getLogger("rm").warning("attention: %s", problem)
    return SplitAttention


def _flash_attention_versions(device: torch.device) -> list[int]:
    """What can be tried, the fastest first."""
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    has_package = importlib.util.find_spec("flash_attn_interface") is not None
    return [3, 2] if is_hopper and has_package else [2]


def _activate_flash_attention(version: int) -> None:
    if version == 3:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()


@torch.enable_grad()  # also where a model is built for scoring alone
def _disagreement(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> float:
    """The largest relative difference between varlen and split: outputs and gradients, with and without window."""
    segments = [(7, 5, 9), (0, 33), (20, 4, 6, 11)]
    tokens = sum(map(sum, segments))
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(tokens, n, head_dim, device=device, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]
    gaps = []
    for window in (NO_WINDOW, 8):
        results = []
        for kernel in (SplitAttention, VarlenAttention):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = kernel(segments, device)(*leaves, window=window, scale=head_dim**-0.5)
            out.float().square().sum().backward()
            results.append([out.detach(), *(x.grad for x in leaves)])
        gaps += [((a - b).abs().max() / b.abs().max()).item() for b, a in zip(*results, strict=True)]
    return max(gaps)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """[0, l1, l1 + l2, ...] as FlashAttention wants it, (len + 1,) int32."""
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return _to_device(torch.from_numpy(ends), device)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, for which the host does not wait."""
    return x.to(device, non_blocking=True)
