"""Statistics of plain arrays: intervals, paired tests, correlations. What is not defined is None.

Shapes: n values, C clusters of them, B resamples.
"""

import math

import numpy as np

RESAMPLES, SEED = 2000, 0  # of every bootstrap: the same data gives the same interval


def mean(x: np.ndarray) -> float | None:
    """The mean, None of nothing."""
    return float(x.mean()) if len(x) else None


def wilson(share: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson score interval of a share observed in n independent trials (Wilson 1927)."""
    if n == 0:
        return None
    z = 1.959963984540054
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def clustered_mean(x: np.ndarray, cluster: np.ndarray) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a mean whose terms come in clusters, resampled whole, with replacement.

    Pairs of one conversation are not independent; an interval that takes them for it is too narrow. None where there
    are not two clusters.
    """
    _, cluster = np.unique(cluster, return_inverse=True)
    sums, sizes = np.bincount(cluster, x), np.bincount(cluster)  # (C,)
    if len(sums) < 2:
        return None
    draw = np.random.default_rng(SEED)
    at_once = max(1, 2**22 // len(sums))  # bounds the memory, whatever C
    means = []
    for start in range(0, RESAMPLES, at_once):
        drawn = draw.integers(0, len(sums), (min(at_once, RESAMPLES - start), len(sums)))  # (B, C)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def paired(ours: np.ndarray, theirs: np.ndarray, cluster: np.ndarray) -> dict:
    """Whether two models differ on the same pairs, from their shares of right answers (n,), a tie 0.5.

    McNemar's exact test of the pairs on which they differ (a tie against a right answer is a difference too), which
    takes pairs for independent; and the difference of accuracies with its bootstrap interval, which does not.
    """
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    return {
        "n": len(ours),
        "better": better,
        "worse": worse,
        "mcnemar_p": sign_test(better, worse),
        "difference": mean(ours - theirs),
        "difference_ci95_clustered": clustered_mean(ours - theirs, cluster),
    }


def sign_test(a: int, b: int) -> float:
    """The exact two-sided p of a against b under even odds: McNemar's test of a + b discordant pairs."""
    n = a + b
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(a, b) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def quantiles(x: np.ndarray) -> dict | None:
    """Minimum, 5 %, quartiles, 95 % and maximum."""
    if not len(x):
        return None
    at = {"min": 0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}
    return dict(zip(at, np.quantile(x, list(at.values())).tolist(), strict=True))


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation; None where one of them is constant."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """(n,) places from 1, equal values sharing the mean of theirs: Pearson's of them is Spearman's."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
