"""The slow and obvious twin of everything fast: dense sight, one sequence at a time, full logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sight(documents, window: int) -> Tensor:
    """The rule of sight, entry by entry: (T, T) bool, q sees k."""
    where = []  # (doc, branch, position) of every token of the row
    for doc, (prefix, *replies) in enumerate(documents):
        where += [(doc, 0, i) for i in range(prefix)]
        where += [(doc, b, prefix + i) for b, reply in enumerate(replies, 1) for i in range(reply)]
    seen = torch.zeros(len(where), len(where), dtype=torch.bool)
    for q, (doc, branch, position) in enumerate(where):
        for k in range(q + 1):
            other_doc, other_branch, other_position = where[k]
            on_path = other_doc == doc and other_branch in (0, branch)
            seen[q, k] = on_path and (window == 0 or position - other_position < window)
    return seen


class DenseAttention:
    """The rule of sight as one (T, T) mask and a softmax written out; same signature as the kernels of rm.attention."""

    def __init__(self, documents, device):
        self.documents = documents

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhe,khe->hqk", q, k) * scale
        weights = scores.masked_fill(~sight(self.documents, window), float("-inf")).softmax(-1)
        return torch.einsum("hqk,khe->qhe", weights, v)


def hidden_of(model, tokens: list[int]) -> Tensor:
    """Hidden states of one text alone: (n, D)."""
    return model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), [(0, len(tokens))])


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def reward_of(model, tokens: list[int]) -> Tensor:
    """The reward of one text alone: ()."""
    return model.score(hidden_of(model, tokens)[-1].float())[0]


def pair_loss_sum(model, pairs) -> Tensor:
    """-log(sigmoid(chosen - rejected)), pair by pair, text by text."""
    losses = [
        -torch.log(torch.sigmoid(reward_of(model, chosen) - reward_of(model, rejected))) for chosen, rejected in pairs
    ]
    return torch.stack(losses).sum()


def text_loss_sum(model, texts) -> Tensor:
    """Cross entropy of every token but the first, text by text, with full logits."""
    head = model.embed if model.config.tie_embeddings else model.lm_head
    return torch.stack(
        [cross_entropy_sum(hidden_of(model, t)[:-1], head.weight, torch.tensor(t[1:], dtype=torch.long)) for t in texts]
    ).sum()
