"""Slow, plain implementations to compare the fast ones with: a dense mask, one sequence at a time, full logits."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from rm.data.batch import Segment


def attention_mask(segments: list[Segment], window: int) -> Tensor:
    """The mask of `rm.model.attention`, entry by entry: (T, T) bool, whether query q attends to key k."""
    tokens = []  # (segment, reply, position) of every token of the micro-batch; the prompt is reply 0
    for segment, (prefix, *replies) in enumerate(segments):
        tokens += [(segment, 0, i) for i in range(prefix)]
        for reply, length in enumerate(replies, 1):
            tokens += [(segment, reply, prefix + i) for i in range(length)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (segment, reply, position) in enumerate(tokens):
        for k in range(q + 1):
            key_segment, key_reply, key_position = tokens[k]
            same_text = key_segment == segment and key_reply in (0, reply)
            mask[q, k] = same_text and (window == 0 or position - key_position < window)
    return mask


class DenseAttention:
    """One (T, T) mask and a softmax written out, with the signature of the kernels of `rm.model.attention`."""

    def __init__(self, segments: list[Segment], device: torch.device):
        self.segments = segments

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float = 0.0) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhe,khe->hqk", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~attention_mask(self.segments, window), float("-inf")).softmax(-1)
        return torch.einsum("hqk,khe->qhe", weights, v)


def hidden_of(model, tokens: list[int]) -> Tensor:
    """Hidden states of one text alone: (n, D)."""
    return model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), [(0, len(tokens))])


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Summed cross entropy from all logits at once: () fp32."""
    logits = (hidden @ weight.T).float() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


def reward_of(model, tokens: list[int]) -> Tensor:
    """The reward of one text alone: ()."""
    return model.score(hidden_of(model, tokens)[-1].float())[0]


def pair_loss_sum(model, pairs) -> Tensor:
    """-log(sigmoid(chosen - rejected)), pair by pair, text by text."""
    losses = [
        -torch.log(torch.sigmoid(reward_of(model, chosen) - reward_of(model, rejected))) for chosen, rejected in pairs
    ]
    return torch.stack(losses).sum()


def preference_loss(rewards, grade, label: float, margin: float, settings) -> Tensor:
    """One prompt's loss, pair by pair and choice by choice: () fp64."""
    rewards = [torch.as_tensor(r, dtype=torch.double) for r in rewards]
    pairs = list(itertools.combinations(range(len(rewards)), 2))
    total = torch.zeros((), dtype=torch.double)
    for i, j in pairs:
        if settings.loss == "bradley_terry":
            p, m = (0.5, 0.0) if grade[i] == grade[j] or label == 0.5 else (label, margin)
            p = p if grade[i] >= grade[j] else 1 - p
            e = settings.label_smoothing
            p = (1 - e) * p + e * (1 - p)
            first_wins, second_wins = (torch.sigmoid(sign * (rewards[i] - rewards[j]) - m) for sign in (1, -1))
            total = total - (p * torch.log(first_wins) + (1 - p) * torch.log(second_wins)) / len(pairs)
        total = total + settings.center_rewards_coefficient * (rewards[i] + rewards[j]) ** 2 / len(pairs)
    if settings.loss == "plackett_luce":
        for i in range(len(rewards)):
            remaining = [rewards[j] for j in range(len(rewards)) if grade[j] <= grade[i]]
            total = total - torch.log(torch.exp(rewards[i]) / sum(torch.exp(r) for r in remaining))
    return total


def ranking_loss_sum(model, rankings, grades, settings) -> Tensor:
    """The loss of rankings of any number of full texts, text by text."""
    return torch.stack(
        [
            preference_loss([reward_of(model, text) for text in texts], grade, 1.0, 0.0, settings)
            for texts, grade in zip(rankings, grades, strict=True)
        ]
    ).sum()


def text_loss_sum(model, texts) -> Tensor:
    """Cross entropy of every token but the first, text by text, with full logits."""
    head = model.embed if model.config.tie_embeddings else model.lm_head
    return torch.stack(
        [cross_entropy_sum(hidden_of(model, t)[:-1], head.weight, torch.tensor(t[1:], dtype=torch.long)) for t in texts]
    ).sum()
