"""How well rewards order more than two replies to a prompt: rank correlation, NDCG, and what best-of-n loses.

All are means over prompts, in fp64, with intervals from resampled conversations. A prompt counts if it has at least
three replies, which are not all graded alike: of two replies, accuracy says all.

Shapes: K replies to a prompt.
"""

import math
from collections.abc import Sequence

import numpy as np

from rm.evaluation.metrics import ScoredReplies
from rm.evaluation.stats import clustered_interval, mean


def list_report(scored: ScoredReplies) -> dict | None:
    """The entry `lists` of a set in report.json; None where no prompt counts."""
    prompts, of_prompt = [], []
    for i, (start, end) in enumerate(zip(scored.offsets[:-1], scored.offsets[1:], strict=True)):
        rewards, grade = scored.rewards[start:end], scored.grade[start:end]
        if end - start > 2 and np.ptp(grade) > 0:
            prompts.append(i)
            of_prompt.append((rewards, grade))
    if not prompts:
        return None
    cluster = scored.conversation[prompts]

    def over_prompts(name: str, values: Sequence[float]) -> dict:
        values = np.array(values)
        return {name: mean(values), f"{name}_ci95_clustered": clustered_interval(values, cluster)}

    report = {"prompts": len(prompts)}
    report |= over_prompts("kendall_tau_b", [kendall_tau_b(*one) for one in of_prompt])
    report |= over_prompts("ndcg", [ndcg(*one) for one in of_prompt])
    rows = []
    sizes = np.array([len(rewards) for rewards, _ in of_prompt])
    for n in _powers_of_two(sizes.max()):
        has_n = np.flatnonzero(sizes >= n)
        chosen, best = np.array([best_of_n(*of_prompt[i], n) for i in has_n]).T
        interval = clustered_interval(best - chosen, cluster[has_n])
        rows.append({"n": n, "prompts": len(has_n), "grade": mean(chosen), "best_grade": mean(best),
                     "regret": mean(best - chosen), "regret_ci95_clustered": interval})  # fmt: skip
    return report | {"best_of_n": rows}


def kendall_tau_b(rewards: np.ndarray, grade: np.ndarray) -> float:
    """Kendall's tau-b of a prompt's (K,) rewards and grades, -1 to 1 (Kendall 1945), which corrects for ties.

    0 where all rewards are equal, for which it is not defined: they say nothing about the order.
    """
    i, j = np.triu_indices(len(rewards), 1)
    by_reward, by_grade = np.sign(rewards[i] - rewards[j]), np.sign(grade[i] - grade[j])
    scale = math.sqrt(np.count_nonzero(by_reward) * np.count_nonzero(by_grade))
    return float(by_reward @ by_grade) / scale if scale else 0.0


def ndcg(rewards: np.ndarray, grade: np.ndarray) -> float:
    """Normalized discounted cumulative gain of the order of a prompt's (K,) rewards (Järvelin and Kekäläinen 2002).

    The gain of a reply is the number of different grades below its own, so that ranks and scores of any scale count
    alike; the discount at place p, from 1, is 1 / log2(p + 1). Replies of equal reward share their discounts' mean.
    """
    _, gain = np.unique(grade, return_inverse=True)
    discount = 1 / np.log2(np.arange(len(gain)) + 2)
    ideal = np.sort(gain)[::-1] @ discount
    return float(gain @ _shared(discount, rewards) / ideal)


def best_of_n(rewards: np.ndarray, grade: np.ndarray, n: int) -> tuple[float, float]:
    """(expected grade of the reply with the highest reward, expected highest grade) among n of a prompt's K replies.

    The n replies are drawn at random, without replacement; the expectation is exact.
    """
    k = len(rewards)
    # The reply at place p, from 0, is the first of n drawn ones if the n - 1 others come from the k - 1 - p behind it.
    first = np.array([math.comb(k - 1 - p, n - 1) for p in range(k)]) / math.comb(k, n)
    return float(grade @ _shared(first, rewards)), float(grade @ _shared(first, grade))


def _shared(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """(K,) the value of each reply's place, the highest `by` first; replies with equal `by` share their mean."""
    _, inverse, counts = np.unique(-by, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)  # of the places that each distinct `by` takes
    total = np.append(0, np.cumsum(values))
    return ((total[ends] - total[ends - counts]) / counts)[inverse]


def _powers_of_two(largest: int) -> list[int]:
    """2, 4, 8, ..., and the largest number itself."""
    powers = [2**i for i in range(1, int(largest).bit_length()) if 2**i <= largest]
    return powers if powers[-1] == largest else [*powers, int(largest)]
