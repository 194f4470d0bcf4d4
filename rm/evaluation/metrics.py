"""Metrics of scored replies: accuracy with confidence intervals, calibration, margins. Length and lists: see there.

All functions are pure and compute in fp64. The unit is the ordered pair: two replies to one prompt, of which one is
graded better. A preference record is one pair; a ranking of K replies gives up to K (K - 1) / 2 pairs, replies of equal
grade give none. An undefined metric (the accuracy of no pairs, the correlation of constants) is None, which is null in
report.json.

Shapes: N prompts, R replies, P ordered pairs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from rm.evaluation.stats import clustered_interval, mean, quantiles, wilson_interval

CONFIDENCE_BINS = 10  # equal bins of the reliability diagram, from 0.5 to 1
MARGIN_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bin edges of |margin|
LENGTH_EDGES = (-500, -100, 0, 1, 101, 501)  # bin edges of the length difference, better minus worse, in characters
LENGTH_BINS = ("< -500", "-500…-101", "-100…-1", "0", "1…100", "101…500", "> 500")
MAX_TURNS = 5  # prompts with this many user messages or more share one table row


@dataclass(frozen=True, eq=False)
class ScoredReplies:
    """N prompts with R replies: their rewards and grades, and the attributes by which accuracy is broken down."""

    rewards: np.ndarray  # (R,) float64
    grade: np.ndarray  # (R,) higher is better, equal is a tie
    length: np.ndarray  # (R,) characters of the reply's last message
    offsets: np.ndarray  # (N + 1,) prompt i has the replies offsets[i] : offsets[i + 1]
    conversation: np.ndarray  # (N,) int; prompts of one conversation have the same value
    turns: np.ndarray  # (N,) int; number of user messages
    subset: np.ndarray  # (N,) str; "" if the record names no subset

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(better reply, worse reply, prompt) of every ordered pair, as (P,) indices, sorted by prompt."""
        return ordered_pairs(self.grade, self.offsets)

    @cached_property
    def margin(self) -> np.ndarray:
        """(P,) reward of the better reply minus reward of the worse reply."""
        better, worse, _ = self.pairs
        return self.rewards[better] - self.rewards[worse]

    @cached_property
    def length_difference(self) -> np.ndarray:
        """(P,) length of the better reply minus length of the worse reply."""
        better, worse, _ = self.pairs
        return self.length[better] - self.length[worse]

    def select(self, prompts: np.ndarray) -> "ScoredReplies":
        """The prompts with these indices, which must be ascending, and their replies."""
        counts = np.diff(self.offsets)
        replies = np.isin(np.repeat(np.arange(len(counts)), counts), prompts)
        by_reply = {name: getattr(self, name)[replies] for name in ("rewards", "grade", "length")}
        by_prompt = {name: getattr(self, name)[prompts] for name in ("conversation", "turns", "subset")}
        return ScoredReplies(offsets=np.append(0, np.cumsum(counts[prompts])), **by_reply, **by_prompt)


def concatenate(sets: Sequence[ScoredReplies]) -> ScoredReplies:
    """Pool several sets into one. Every pair has the same weight (a micro-average over sets)."""
    counts = np.concatenate([np.diff(one.offsets) for one in sets])
    names = [field.name for field in fields(ScoredReplies) if field.name != "offsets"]
    columns = {name: np.concatenate([getattr(one, name) for one in sets]) for name in names}
    return ScoredReplies(offsets=np.append(0, np.cumsum(counts)), **columns)


def ordered_pairs(grade: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of replies to one prompt whose grades differ.

    Args:
        grade: (R,) grade of every reply.
        offsets: (N + 1,) prompt i has the replies offsets[i] : offsets[i + 1].

    Returns:
        (better reply, worse reply, prompt), each (P,) indices, sorted by prompt.
    """
    counts = np.diff(offsets)
    # The empty first part is the result if there are no prompts.
    empty = np.zeros(0, np.int64)
    better, worse, prompt = [empty], [empty], [empty]
    # Vectorised over all prompts that have the same number of replies: they share the positions of their pairs.
    for k in np.unique(counts):
        prompts = np.flatnonzero(counts == k)
        i, j = np.triu_indices(k, 1)
        first, second = np.add.outer(offsets[prompts], i), np.add.outer(offsets[prompts], j)
        second_is_better = grade[first] < grade[second]
        differ = grade[first] != grade[second]
        better.append(np.where(second_is_better, second, first)[differ])
        worse.append(np.where(second_is_better, first, second)[differ])
        prompt.append(np.broadcast_to(prompts[:, None], first.shape)[differ])
    better, worse, prompt = np.concatenate(better), np.concatenate(worse), np.concatenate(prompt)
    order = np.argsort(prompt, kind="stable")
    return better[order], worse[order], prompt[order]


def summary(scored: ScoredReplies) -> dict:
    """The scalar metrics: the top level of report.json, and the first entries of every set."""
    margin = scored.margin
    _, _, prompt = scored.pairs
    correct = correctness(margin)
    best = top1(scored)
    return {
        "n": len(margin),
        "prompts": len(scored.offsets) - 1,
        "accuracy": mean(correct),
        "accuracy_ci95": wilson_interval(mean(correct), len(correct)),
        "accuracy_ci95_clustered": clustered_interval(correct, scored.conversation[prompt]),
        "top1": mean(best[~np.isnan(best)]),
        "ties": int((margin == 0).sum()),
        "loss": mean(nll(margin)),
        "margin_mean": mean(margin),
        "margin_std": float(margin.std()) if len(margin) else None,
        "reward_mean": mean(scored.rewards),
        "reward_std": float(scored.rewards.std()) if len(scored.rewards) else None,
    }


def details(scored: ScoredReplies) -> dict:
    """The tables of one set: calibration, quantiles of margins and rewards, accuracy breakdowns."""
    margin = scored.margin
    correct = correctness(margin)
    accuracy_by = {}
    for breakdown, masks in _breakdowns(scored).items():
        accuracy_by[breakdown] = {name: accuracy_row(correct[mask]) for name, mask in masks.items()}
    return {
        "calibration": calibration(margin),
        "margin_quantiles": quantiles(margin),
        "reward_quantiles": quantiles(scored.rewards),
        "accuracy_by": accuracy_by,
    }


def _breakdowns(scored: ScoredReplies) -> dict[str, dict[str, np.ndarray]]:
    """{breakdown: {row name: (P,) bool mask of the row's pairs}}."""
    _, _, prompt = scored.pairs
    turns = np.minimum(scored.turns[prompt], MAX_TURNS)
    by_turns = {}
    for k in np.unique(turns).tolist():
        name = str(k) if k < MAX_TURNS else f"{MAX_TURNS} and more"
        by_turns[name] = turns == k
    breakdowns = {
        "margin": interval_masks(np.abs(scored.margin), MARGIN_EDGES),
        "length_difference": dict(zip(LENGTH_BINS, _bin_masks(scored.length_difference, LENGTH_EDGES), strict=True)),
        "turns": by_turns,
    }
    if scored.subset.any():
        subset = scored.subset[prompt]
        breakdowns["subset"] = {name or "(none)": subset == name for name in np.unique(scored.subset).tolist()}
    return breakdowns


def correctness(margin: np.ndarray) -> np.ndarray:
    """(P,) 1 if the better reply has the higher reward, 0 if the lower, 0.5 for a tie.

    A tie counts half because both `>` and `>=` would be biased.
    """
    return np.where(margin == 0, 0.5, margin > 0)


def nll(margin: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(P,) -log sigmoid(margin / temperature): the Bradley-Terry loss."""
    return np.logaddexp(0, -margin / temperature)


def accuracy_row(correct: np.ndarray) -> dict:
    """One row of an accuracy table, from the correctness of its pairs."""
    return {"n": len(correct), "accuracy": mean(correct), "ci95": wilson_interval(mean(correct), len(correct))}


def top1(scored: ScoredReplies) -> np.ndarray:
    """(N,) probability that a prompt's highest-scoring reply is one of its best graded; NaN if all grades are equal.

    If m replies share the highest reward, each is selected with probability 1 / m, so that a tied pair counts half, as
    in the accuracy.
    """
    starts, counts = scored.offsets[:-1], np.diff(scored.offsets)
    if not len(starts):
        return np.zeros(0)
    highest_reward = np.repeat(np.maximum.reduceat(scored.rewards, starts), counts)  # (R,)
    best_grade = np.repeat(np.maximum.reduceat(scored.grade, starts), counts)  # (R,)
    selected = scored.rewards == highest_reward
    selected_best = np.add.reduceat(selected & (scored.grade == best_grade), starts, dtype=float)
    probability = selected_best / np.add.reduceat(selected, starts, dtype=float)
    grades_differ = np.minimum.reduceat(scored.grade, starts) < best_grade[starts]
    return np.where(grades_differ, probability, np.nan)


def calibration(margin: np.ndarray) -> dict:
    """Whether the model's confidence in its own choice, sigmoid(|margin|), equals its accuracy.

    Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) over equal bins of confidence, and the
    temperature that calibrates the margins.
    """
    confidence, correct = 1 / (1 + np.exp(-np.abs(margin))), correctness(margin)
    bin_index = np.minimum((confidence - 0.5) * 2 * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(int)
    bins = []
    for b in range(CONFIDENCE_BINS):
        mask = bin_index == b
        edges = {"from": 0.5 + b / 2 / CONFIDENCE_BINS, "to": 0.5 + (b + 1) / 2 / CONFIDENCE_BINS}
        bins.append(edges | {"confidence": mean(confidence[mask])} | accuracy_row(correct[mask]))
    gaps = [b["n"] / len(margin) * abs(b["accuracy"] - b["confidence"]) for b in bins if b["n"]]
    temperature = fit_temperature(margin)
    return {
        "ece": sum(gaps) if gaps else None,
        "temperature": temperature,
        "loss_at_temperature": mean(nll(margin, temperature)) if temperature else None,
        "reliability": bins,
    }


def fit_temperature(margin: np.ndarray) -> float | None:
    """The T > 0 that minimises the mean of -log sigmoid(margin / T). Above 1, the model is overconfident.

    None if there is no minimum: no pair is ranked wrong (T would be 0), or the mean margin is not above 0 (T would be
    infinite).
    """
    if not len(margin) or margin.min() >= 0 or margin.mean() <= 0:
        return None

    def slope(inverse: float) -> float:
        """Derivative of the mean loss with respect to 1 / T. The loss is convex in 1 / T."""
        # exp(-logaddexp(0, x)) is sigmoid(-x) without overflow.
        return -float(np.mean(margin * np.exp(-np.logaddexp(0, margin * inverse))))

    # Bracket the minimum by doubling, then bisect until the interval is as narrow as fp64 allows.
    low, high = 0.0, 1 / np.abs(margin).max()
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return 1 / high


def interval_masks(x: np.ndarray, edges: tuple) -> dict[str, np.ndarray]:
    """{"a to b": mask of a <= x < b} for consecutive edges; the first and the last interval are unbounded."""
    inner = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    names = [f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and above"]
    return dict(zip(names, _bin_masks(x, edges), strict=True))


def _bin_masks(x: np.ndarray, edges: tuple) -> list[np.ndarray]:
    bin_index = np.digitize(x, edges)
    return [bin_index == i for i in range(len(edges) + 1)]
