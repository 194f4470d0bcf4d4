"""Losses: pure functions of tensors, summed in fp32. The caller divides once, by the global count (`rm.step`).

Shapes: L labelled tokens, D width, V vocabulary, N pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**24  # logits held at a time, whatever L and V: 64 MiB in fp32


def bradley_terry(rewards: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), the pairwise loss of InstructGPT (arXiv 2203.02155, eq. 1), one value a pair.

    Args:
        rewards: (N, 2) fp32, the chosen reply first.

    Returns:
        (N,) fp32.
    """
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross entropies of `softmax(hidden @ weight.T)` without ever holding (L, V).

    Chunk by chunk, the forward computes the loss *and* its gradients while the chunk's logits are at hand:
    recomputing them in the backward would cost a third GEMM over the vocabulary. A frozen head (LoRA) costs no weight
    gradient.

    Args:
        hidden: (L, D) hidden states at the labelled positions only.
        weight: (V, D) of the language-model head.
        targets: (L,) ids of the next tokens.

    Returns:
        () fp32.
    """
    grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, grad and hidden.requires_grad, grad and weight.requires_grad
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()  # (chunk, V)
            at_target = targets[part, None]
            most = logits.amax(-1, keepdim=True)
            loss += (most - logits.gather(1, at_target)).sum()
            odds = logits.sub_(most).exp_()  # in place, where logsumexp would hold the chunk twice
            total = odds.sum(-1, keepdim=True)
            loss += total.log().sum()
            if need_hidden or need_weight:  # d loss / d logits = softmax - one hot
                slope = odds.div_(total)
                slope.scatter_add_(1, at_target, torch.full_like(total, -1.0))
                slope = slope.to(hidden.dtype)
            if need_hidden:
                torch.mm(slope, weight, out=hidden_grad[part])
            if need_weight:
                _add_product(weight_grad, slope, hidden[part])
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype) if need_weight else None)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total (V, D) fp32 += slope (chunk, V).T @ hidden (chunk, D): in place where the dtypes allow it."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden
