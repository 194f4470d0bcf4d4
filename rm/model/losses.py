"""Losses: pure functions of tensors, in fp32. The caller sums them and divides once, by the count of the whole step.

The preferences of a micro-batch are tables, one line for each prompt: the rewards and the grades of its K replies. A
grade is higher for a better reply, equal for a tie, and nan where a prompt has fewer than K replies, so that prompts
with any numbers of replies are computed at once.

Shapes: N prompts, K replies of the prompt that has most, C = K (K - 1) / 2 pairs; R texts, A attributes;
L labelled tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rm.config import SettingsGroup, require_not_negative, setting
from rm.data.examples import Examples

# Logits in memory at a time, whatever L and V: 64 MiB in fp32 on a CPU, 512 MiB on a GPU, where small chunks take long:
# 195 ms with 2**24 for 8,000 tokens and V = 128,256 on an H200, 67 ms with 2**27, 59 ms with 2**28.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}


@dataclass(frozen=True, kw_only=True)
class LossSettings(SettingsGroup):
    """Preference loss"""

    loss: str = setting(
        "bradley_terry",
        "bradley_terry: the mean over all pairs of a prompt's replies; plackett_luce: the likelihood of the whole "
        "ranking, best to worst; for pairs both are the same; regression: squared errors of --attributes",
        choices=("bradley_terry", "plackett_luce", "regression"),
    )
    attributes: tuple[str, ...] = setting(
        (), "with --loss regression: the numbers of each record that are learned, an output of the head for each"
    )
    label_smoothing: float = setting(0.0, "assumed probability that a label is wrong, below 0.5")
    center_rewards_coefficient: float = setting(
        0.0, "weight of the squared sum of a pair's rewards, which keeps rewards near zero on average; 0.01 is common"
    )
    scale_by_strength: bool = setting(
        False, "multiply a pair's loss by how much better its better reply is, where the data says so (HelpSteer)"
    )
    sft_loss_coefficient: float = setting(
        0.0, "weight of the chosen replies' cross entropy, which is added to the loss of their pair; GRM: 0.001"
    )

    def check(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss == "plackett_luce":
            raise ValueError(
                "--label_smoothing is only defined for --loss bradley_terry: use that loss, or leave it at 0"
            )
        require_not_negative(
            center_rewards_coefficient=self.center_rewards_coefficient, sft_loss_coefficient=self.sft_loss_coefficient
        )
        if (self.loss == "regression") != bool(self.attributes):
            raise ValueError("--loss regression and --attributes go together: give both, or neither")
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"--attributes names one twice: {' '.join(self.attributes)}")
        if self.attributes:
            for name in ("label_smoothing", "center_rewards_coefficient", "scale_by_strength", "sft_loss_coefficient"):
                if getattr(self, name):
                    raise ValueError(
                        f"--{name} is of losses that compare replies, not of --loss regression: leave it out"
                    )

    @property
    def has_sft_loss(self) -> bool:
        return self.sft_loss_coefficient > 0

    @classmethod
    def of_outputs(cls, names: Sequence[str]) -> "LossSettings":
        """Those of a model with an output for each of these names; without names it has one."""
        return cls(loss="regression", attributes=tuple(names)) if names else cls()


def check_fits(examples: Examples, settings: LossSettings) -> None:
    """Raise ValueError for an example with a single reply, or with a label or margin that the loss would ignore."""
    if settings.attributes:
        return
    single = np.diff(examples.reply_offsets) < 2
    if single.any():
        raise ValueError(
            f"record {examples.record[single][0] + 1} of the data has a single reply; a preference needs two or more"
        )
    has_label_or_margin = (examples.label != 1) | (examples.margin != 0)
    if settings.loss == "plackett_luce" and has_label_or_margin.any():
        raise ValueError(
            f"record {examples.record[has_label_or_margin][0] + 1} of the data has a 'label' or a 'margin', which "
            f"--loss plackett_luce does not use: use --loss bradley_terry, or remove them"
        )


def preference_loss(
    rewards: Tensor,
    grade: Tensor,
    label: Tensor,
    margin: Tensor,
    settings: LossSettings,
    weight: Tensor | float = 1.0,
    strength: Tensor | float = 1.0,
) -> Tensor:
    """The loss of every prompt, as the settings choose it.

    Args:
        rewards: (N, K) fp32; entries without a reply may have any finite value.
        grade: (N, K), nan for no reply.
        label: (N,) probability that the grades are right.
        margin: (N,) by how much a better reply's reward should exceed a worse one's.
        weight: (N,) factor of the loss.
        strength: (N,) how much better a better reply is. With --scale_by_strength it multiplies what compares rewards:
            the scaled Bradley-Terry loss of HelpSteer2-Preference (arXiv 2410.01257).

    Returns:
        (N,) fp32.
    """
    pairs = pairs_of(rewards, grade, label)
    if settings.loss == "plackett_luce":
        loss = plackett_luce(rewards, grade)
    else:
        loss = bradley_terry(pairs, margin, settings.label_smoothing)
    if settings.scale_by_strength:
        loss = loss * strength
    if settings.center_rewards_coefficient:
        loss = loss + settings.center_rewards_coefficient * off_centre(pairs)
    return loss * weight


class Pairs(NamedTuple):
    """All pairs of replies to each prompt, the reply with the higher grade first."""

    better: Tensor  # (N, C) rewards
    worse: Tensor  # (N, C) rewards
    label: Tensor  # (N, C) probability that this order is right: the prompt's label; 0.5 for equal grades
    weight: Tensor  # (N, C) 1 / (number of the prompt's pairs); 0 where a pair does not exist


def pairs_of(rewards: Tensor, grade: Tensor, label: Tensor) -> Pairs:
    """Pairs from tables: see `preference_loss` for the arguments."""
    i, j = torch.triu_indices(grade.shape[1], grade.shape[1], offset=1, device=grade.device)
    first, second, first_grade, second_grade = rewards[:, i], rewards[:, j], grade[:, i], grade[:, j]
    swap = first_grade < second_grade
    valid = (~(first_grade.isnan() | second_grade.isnan())).to(rewards.dtype)
    return Pairs(
        better=torch.where(swap, second, first),
        worse=torch.where(swap, first, second),
        label=torch.where(first_grade == second_grade, 0.5, label[:, None]),
        weight=valid / valid.sum(1, keepdim=True).clamp(min=1),
    )


def bradley_terry(pairs: Pairs, margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over a prompt's pairs of  -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m),  d = better - worse.

    With K = 2, p = 1 and m = 0 the pairwise loss of Bradley and Terry (Biometrika 39, 1952); with K > 2 InstructGPT's,
    which weighs each of a prompt's pairs by 1 / C (arXiv 2203.02155, eq. 1). p is the label, where a tie is 0.5: a
    draw is half a win and half a loss, and pulls two rewards together. m is Llama 2's margin (arXiv 2307.09288, eq. 2)
    for whichever reply is preferred; a tie has none. With smoothing e, p becomes p (1 - e) + (1 - p) e, as in
    conservative DPO (Mitchell, A note on DPO with noisy preferences, 2023).

    Args:
        margin: (N,).
        label_smoothing: e.

    Returns:
        (N,) fp32.
    """
    p = pairs.label * (1 - label_smoothing) + (1 - pairs.label) * label_smoothing
    margin = torch.where(pairs.label == 0.5, 0.0, margin[:, None])
    difference = pairs.better - pairs.worse
    loss = -p * F.logsigmoid(difference - margin) - (1 - p) * F.logsigmoid(-difference - margin)
    return (loss * pairs.weight).sum(1)


def plackett_luce(rewards: Tensor, grade: Tensor) -> Tensor:
    """-log probability that replies are chosen in the order of their grades, each among those not yet chosen.

    sum_i [ log sum_{j: grade_j <= grade_i} exp r_j  -  r_i ]: Luce (Individual choice behavior, 1959), Plackett
    (Applied Statistics 24, 1975), in learning to rank ListMLE (Xia et al., ICML 2008). Tied replies are each chosen
    among all of them (Breslow's convention, Biometrics 30, 1974), so their order does not matter. It is a sum over the
    choices, not a mean: a longer ranking carries more information, and weighs more. Pairs give Bradley-Terry.

    Returns:
        (N,) fp32.
    """
    remains = grade[:, None, :] <= grade[:, :, None]  # (N, K, K): whether j is not yet chosen when i is
    total = rewards[:, None, :].masked_fill(~remains, torch.finfo(rewards.dtype).min).logsumexp(-1)  # (N, K)
    return torch.where(grade.isnan(), 0.0, total - rewards).sum(1)


def regression(outputs: Tensor, attributes: Tensor) -> Tensor:
    """The mean squared error of each text's attributes, over those that are known.

    The loss of SteerLM's reward model (HelpSteer2, arXiv 2406.08673; NeMo-Aligner's MegatronGPTRegressionRewardModel,
    which divides by the known attributes of a micro-batch). Here every text has the same weight, so that the loss does
    not depend on micro-batches; where all attributes are known, both are the mean over all of them.

    Args:
        outputs: (R, A) fp32.
        attributes: (R, A) fp32, nan where unknown.

    Returns:
        (R,) fp32.
    """
    is_known = ~attributes.isnan()
    errors = outputs - torch.where(is_known, attributes, outputs.detach())
    return errors.square().sum(1) / is_known.sum(1).clamp(min=1)


def off_centre(pairs: Pairs) -> Tensor:
    """The mean over a prompt's pairs of (better + worse)^2 (Eisenstein et al., arXiv 2312.09244, eq. 2): (N,) fp32.

    Preferences do not determine where zero is; this term puts it in the middle.
    """
    return ((pairs.better + pairs.worse).square() * pairs.weight).sum(1)


@torch.no_grad()
def agreement(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """How well rewards agree with labels: each prompt's (accuracy, margin), two (N,) fp32.

    Both are means over the prompt's pairs that are no ties: the share of pairs whose rewards have the more probable
    order, where equal rewards count half; and the difference of rewards in that order. A prompt whose pairs are all
    ties has accuracy 0.5 and margin 0.
    """
    decided = (pairs.weight > 0) & (pairs.label != 0.5)
    difference = (pairs.better - pairs.worse) * (pairs.label - 0.5).sign()
    right = (difference > 0).float() + (difference == 0).float() / 2
    count = decided.sum(1)
    accuracy = torch.where(count == 0, 0.5, (right * decided).sum(1) / count.clamp(min=1))
    return accuracy, (difference * decided).sum(1) / count.clamp(min=1)


@torch.no_grad()
def rewards_of_sides(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Each prompt's mean reward of the (chosen, rejected) replies of its pairs that are no ties: two (N,) fp32.

    Their difference is the margin of `agreement`. Where all pairs are ties, both are the mean of the two sides.
    """
    tie, swap = pairs.label == 0.5, pairs.label < 0.5
    middle = (pairs.better + pairs.worse) / 2
    chosen = torch.where(tie, middle, torch.where(swap, pairs.worse, pairs.better))
    rejected = torch.where(tie, middle, torch.where(swap, pairs.better, pairs.worse))
    decided = pairs.weight * ~tie
    weight = torch.where(decided.sum(1, keepdim=True) > 0, decided, pairs.weight)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (chosen * weight).sum(1), (rejected * weight).sum(1)


@torch.no_grad()
def cross_entropy_and_hits(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(the sum of cross entropies, the number of tokens to which the model gives the highest logit), both () fp32.

    As `linear_cross_entropy`, whose arguments these are, it never holds the (L, V) logits; it has no gradient.
    """
    loss, hits = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    chunk = max(1, LOGITS_AT_ONCE[hidden.device.type] // len(weight))
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        logits = (hidden[part] @ weight.T).float() * scale  # (chunk, V)
        if softcap:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        loss += F.cross_entropy(logits, targets[part], reduction="sum")
        hits += (logits.argmax(-1) == targets[part]).sum()
    return loss, hits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    factors: Tensor | None = None,
) -> Tensor:
    """The sum of cross entropies of `softmax(scale * hidden @ weight.T)` without the (L, V) logits in memory.

    Chunk by chunk, the forward computes the loss *and* its gradients from the chunk's logits: recomputing them in the
    backward would cost a third GEMM over the vocabulary. A frozen head (LoRA) costs no weight gradient.

    Args:
        hidden: (L, D) hidden states at the labelled positions only.
        weight: (V, D) of the language-model head.
        targets: (L,) ids of the next tokens.
        softcap: scaled logits become softcap * tanh(logits / softcap); 0: they stay.
        factors: (L,) fp32, of the cross entropy of each token; None: all are 1.

    Returns:
        () fp32.
    """
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    return _LinearCrossEntropy.apply(hidden, weight, targets, need_hidden, need_weight, scale, softcap, factors)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        need_hidden: bool,
        need_weight: bool,
        scale: float,
        softcap: float,
        factors: Tensor | None,
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        chunk = max(1, LOGITS_AT_ONCE[hidden.device.type] // len(weight))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()  # (chunk, V)
            if scale != 1:
                logits *= scale
            if softcap:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap).square_() if need_hidden or need_weight else None  # of the cap
            target = targets[part, None]
            factor = None if factors is None else factors[part, None]  # (chunk, 1)
            largest = logits.amax(-1, keepdim=True)
            # -log softmax at the target is  log sum_v exp(l_v - largest)  +  largest - l_target.
            loss += _times(largest - logits.gather(1, target), factor).sum()
            exponentials = logits.sub_(largest).exp_()  # in place: logsumexp would need the chunk's memory twice
            total = exponentials.sum(-1, keepdim=True)
            loss += _times(total.log(), factor).sum()
            if need_hidden or need_weight:  # d loss / d logits = softmax - one hot
                logits_grad = exponentials.div_(total)
                logits_grad.scatter_add_(1, target, torch.full_like(total, -1.0))
                if softcap:
                    logits_grad *= slope
                if scale != 1:
                    logits_grad *= scale
                if factor is not None:
                    logits_grad *= factor
                logits_grad = logits_grad.to(hidden.dtype)
            if need_hidden:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            if need_weight:
                _add_product(weight_grad, logits_grad, hidden[part])
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype) if need_weight else None)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        hidden_grad, weight_grad = (None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors)
        return hidden_grad, weight_grad, *(None for _ in range(6))


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _add_product(total: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
    """total (V, D) fp32 += logits_grad (chunk, V).T @ hidden (chunk, D): in place where the dtypes allow it."""
    if logits_grad.dtype == total.dtype:
        total.addmm_(logits_grad.T, hidden)
    else:
        total += logits_grad.T @ hidden
