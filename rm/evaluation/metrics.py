"""What scored replies say: accuracy with intervals, calibration, margins, and what length has to do with it.

Pure functions of fp64 arrays. The unit is the ordered pair: two replies to one prompt, one graded better. A preference
record is one pair; a ranking of K replies is up to K (K - 1) / 2, those of equal grade left out. What is not defined
(the accuracy of no pairs, the correlation of constants) is None, null in report.json.

Shapes: N prompts, R replies, P ordered pairs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from rm.evaluation.stats import clustered_mean, mean, pearson, quantiles, ranks, wilson

CONFIDENCE_BINS = 10  # of reliability, over 0.5 to 1
MARGIN_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of |margin|
LENGTH_EDGES = (-500, -100, 0, 1, 101, 501)  # of the better reply's length minus the worse's, whole numbers
LENGTH_BINS = ("< -500", "-500…-101", "-100…-1", "0", "1…100", "101…500", "> 500")
MANY_TURNS = 5  # this many and more are one row


@dataclass(frozen=True, eq=False)
class Scored:
    """N prompts with R replies and their rewards, and what the tables are cut by."""

    rewards: np.ndarray  # (R,) float64
    grade: np.ndarray  # (R,) higher is better, equal is a tie
    length: np.ndarray  # (R,) characters of the answer
    offsets: np.ndarray  # (N + 1,) prompt i has the replies offsets[i] : offsets[i + 1]
    conversation: np.ndarray  # (N,) int; prompts of one conversation share it
    turns: np.ndarray  # (N,) int; messages of the user
    subset: np.ndarray  # (N,) str, "" where the record names none

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(better reply, worse reply, prompt) of every ordered pair, each (P,), by prompt."""
        return ordered_pairs(self.grade, self.offsets)

    @cached_property
    def margin(self) -> np.ndarray:
        """(P,) reward of the better reply minus that of the worse."""
        better, worse, _ = self.pairs
        return self.rewards[better] - self.rewards[worse]

    @cached_property
    def longer(self) -> np.ndarray:
        """(P,) length of the better reply minus that of the worse."""
        better, worse, _ = self.pairs
        return self.length[better] - self.length[worse]

    def only(self, prompts: np.ndarray) -> "Scored":
        """The prompts with these numbers, ascending."""
        counts = np.diff(self.offsets)
        replies = np.isin(np.repeat(np.arange(len(counts)), counts), prompts)
        by_reply = {name: getattr(self, name)[replies] for name in ("rewards", "grade", "length")}
        by_prompt = {name: getattr(self, name)[prompts] for name in ("conversation", "turns", "subset")}
        return Scored(offsets=np.append(0, np.cumsum(counts[prompts])), **by_reply, **by_prompt)


def joined(sets: Sequence[Scored]) -> Scored:
    """Several sets as one: every pair counts alike, so that nothing is an average of averages."""
    counts = np.concatenate([np.diff(one.offsets) for one in sets])
    rest = [field.name for field in fields(Scored) if field.name != "offsets"]
    columns = {name: np.concatenate([getattr(one, name) for one in sets]) for name in rest}
    return Scored(offsets=np.append(0, np.cumsum(counts)), **columns)


def ordered_pairs(grade: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(better reply, worse reply, prompt): all pairs of replies to one prompt that differ in grade, each (P,)."""
    counts = np.diff(offsets)
    better, worse, prompt = [[np.zeros(0, np.int64)] for _ in range(3)]
    for k in np.unique(counts):
        prompts = np.flatnonzero(counts == k)
        first, second = (np.add.outer(offsets[prompts], ends) for ends in np.triu_indices(k, 1))
        rises = grade[first] < grade[second]
        differ = grade[first] != grade[second]
        better.append(np.where(rises, second, first)[differ])
        worse.append(np.where(rises, first, second)[differ])
        prompt.append(np.broadcast_to(prompts[:, None], first.shape)[differ])
    better, worse, prompt = (np.concatenate(parts) for parts in (better, worse, prompt))
    order = np.argsort(prompt, kind="stable")
    return better[order], worse[order], prompt[order]


def summary(scored: Scored) -> dict:
    """The flat numbers, at the top level of report.json and first in every set."""
    margin, (_, _, prompt) = scored.margin, scored.pairs
    shares = right(margin)
    best = top1(scored)
    return {
        "n": len(margin),
        "prompts": len(scored.offsets) - 1,
        "accuracy": mean(shares),
        "accuracy_ci95": wilson(mean(shares), len(shares)),
        "accuracy_ci95_clustered": clustered_mean(shares, scored.conversation[prompt]),
        "top1": mean(best[~np.isnan(best)]),
        "ties": int((margin == 0).sum()),
        "loss": mean(nll(margin)),
        "margin_mean": mean(margin),
        "margin_std": float(margin.std()) if len(margin) else None,
        "reward_mean": mean(scored.rewards),
        "reward_std": float(scored.rewards.std()) if len(scored.rewards) else None,
    }


def details(scored: Scored) -> dict:
    """The tables of one set: calibration, margins, rewards, cuts and length."""
    margin, longer, (_, _, prompt) = scored.margin, scored.longer, scored.pairs
    shares = right(margin)
    named = scored.subset[prompt]
    turns, most = np.minimum(scored.turns[prompt], MANY_TURNS), f"{MANY_TURNS} and more"
    cuts = {
        "margin": intervals(np.abs(margin), MARGIN_EDGES),
        "length_difference": dict(zip(LENGTH_BINS, _bins(longer, LENGTH_EDGES), strict=True)),
        "turns": {str(k) if k < MANY_TURNS else most: turns == k for k in np.unique(turns).tolist()},
    }
    if scored.subset.any():
        cuts["subset"] = {name or "(none)": named == name for name in np.unique(scored.subset).tolist()}
    return {
        "calibration": calibration(margin),
        "margin_quantiles": quantiles(margin),
        "reward_quantiles": quantiles(scored.rewards),
        "accuracy_by": {
            cut: {name: accuracy_of(shares[rows]) for name, rows in parts.items()} for cut, parts in cuts.items()
        },
        "length": length_report(scored),
    }


def right(margin: np.ndarray) -> np.ndarray:
    """(P,) 1 where the better reply scores higher, 0 where lower, 0.5 for a tie: neither `>` nor `>=` is fair to it."""
    return np.where(margin == 0, 0.5, margin > 0)


def nll(margin: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(P,) -log sigmoid(margin / temperature): the Bradley-Terry loss."""
    return np.logaddexp(0, -margin / temperature)


def accuracy_of(shares: np.ndarray) -> dict:
    """One row of a table of accuracies."""
    return {"n": len(shares), "accuracy": mean(shares), "ci95": wilson(mean(shares), len(shares))}


def top1(scored: Scored) -> np.ndarray:
    """(N,) chance that a prompt's highest scored reply is one of its best graded; NaN where all are graded alike.

    Where m replies share the highest score, each is picked with 1 / m: a tied pair counts half here too.
    """
    starts, counts = scored.offsets[:-1], np.diff(scored.offsets)
    if not len(starts):
        return np.zeros(0)
    highest, best = (np.repeat(np.maximum.reduceat(x, starts), counts) for x in (scored.rewards, scored.grade))
    picked = scored.rewards == highest
    good = np.add.reduceat(picked & (scored.grade == best), starts, dtype=float)
    chance = good / np.add.reduceat(picked, starts, dtype=float)
    return np.where(np.minimum.reduceat(scored.grade, starts) < best[starts], chance, np.nan)


def calibration(margin: np.ndarray) -> dict:
    """Whether sigmoid(|margin|), the model's confidence in its own choice, is how often it is right.

    Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) over equal bins of confidence.
    """
    confidence, shares = 1 / (1 + np.exp(-np.abs(margin))), right(margin)
    number = np.minimum((confidence - 0.5) * 2 * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(int)
    bins = []
    for b in range(CONFIDENCE_BINS):
        rows = number == b
        edges = {"from": 0.5 + b / 2 / CONFIDENCE_BINS, "to": 0.5 + (b + 1) / 2 / CONFIDENCE_BINS}
        bins.append(edges | {"confidence": mean(confidence[rows])} | accuracy_of(shares[rows]))
    gaps = [b["n"] / len(margin) * abs(b["accuracy"] - b["confidence"]) for b in bins if b["n"]]
    best = temperature(margin)
    return {
        "ece": sum(gaps) if gaps else None,
        "temperature": best,
        "loss_at_temperature": mean(nll(margin, best)) if best else None,
        "reliability": bins,
    }


def temperature(margin: np.ndarray) -> float | None:
    """The T > 0 that minimises the mean of -log sigmoid(margin / T): above 1 the model is overconfident.

    None where there is none: all pairs right (T would be 0), or the mean margin not above 0 (T would be infinite).
    """
    if not len(margin) or margin.min() >= 0 or margin.mean() <= 0:
        return None

    def slope(inverse: float) -> float:  # of the loss, which is convex in 1 / T
        return -float(np.mean(margin * np.exp(-np.logaddexp(0, margin * inverse))))

    low, high = 0.0, 1 / np.abs(margin).max()
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def intervals(x: np.ndarray, edges: tuple) -> dict[str, np.ndarray]:
    """{"a to b": which of x lie in a <= x < b}, the first and the last bin open."""
    inner = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    return dict(zip([f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and above"], _bins(x, edges), strict=True))


def _bins(x: np.ndarray, edges: tuple) -> list[np.ndarray]:
    number = np.digitize(x, edges)
    return [number == i for i in range(len(edges) + 1)]


def length_report(scored: Scored) -> dict:
    """How far length alone explains the rewards and the grades. Lengths are characters of the answers.

    `longest_accuracy`: of the rule that prefers the longer answer, equal lengths half. `controlled_accuracy`: the mean
    of the accuracies where the better answer is the longer and where it is the shorter: any rule of length alone gets
    0.5. Correlations of reward with length: over all replies, and within prompts (each less its prompt's mean).
    """
    longer, shares = scored.longer, right(scored.margin)
    sides = [mean(shares[longer > 0]), mean(shares[longer < 0])]
    centred = [_centred(x, scored.offsets) for x in (scored.rewards, scored.length)]
    return {
        "longest_accuracy": mean(right(longer)),
        "accuracy_better_longer": sides[0],
        "accuracy_better_shorter": sides[1],
        "controlled_accuracy": None if None in sides else sum(sides) / 2,
        "pearson": pearson(scored.rewards, scored.length),
        "spearman": pearson(ranks(scored.rewards), ranks(scored.length)),
        "pearson_within_prompts": pearson(*centred),
        "spearman_within_prompts": pearson(*map(ranks, centred)),
    }


def _centred(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(R,) each value less its prompt's mean; exactly 0 where a prompt's values are equal."""
    counts = np.diff(offsets)
    if not len(counts):
        return x
    x = x - np.repeat(x[offsets[:-1]], counts)
    return x - np.repeat(np.add.reduceat(x, offsets[:-1]) / counts, counts)
