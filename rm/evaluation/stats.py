"""Statistics of plain arrays: confidence intervals, paired tests, correlations. An undefined statistic is None.

Shapes: n values, C clusters of values, B bootstrap resamples.
"""

import math
from collections.abc import Sequence

import numpy as np

# Every bootstrap uses this number of resamples and this seed: the same data gives the same interval.
RESAMPLES, SEED = 2000, 0


def mean(x: np.ndarray) -> float | None:
    """The mean of (n,) values, None if there are none."""
    return float(x.mean()) if len(x) else None


def wilson_interval(proportion: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson score interval of a proportion observed in n independent trials (Wilson 1927)."""
    if n == 0:
        return None
    z = 1.959963984540054  # the 0.975 quantile of the standard normal distribution
    centre = proportion + z * z / (2 * n)
    half_width = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half_width) / (1 + z * z / n)), min(1.0, (centre + half_width) / (1 + z * z / n))


def clustered_interval(x: np.ndarray, cluster: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of a mean; whole clusters are resampled with replacement.

    Pairs of one conversation are not independent: an interval that assumes independence is too narrow.

    Args:
        x: (n,) values.
        cluster: (n,) the cluster of each value, as any integers.

    Returns:
        (low, high), or None if there are fewer than two clusters.
    """
    return weighted_interval([(1.0, x, cluster)])


def balanced_interval(x: np.ndarray, sign: np.ndarray, cluster: np.ndarray) -> tuple[float, float] | None:
    """`clustered_interval` of the mean of two means: of the values where `sign` is positive, and where it is negative.

    Resamples without values of one sign are left out.
    """
    masks = [mask for mask in (sign > 0, sign < 0) if mask.any()]
    return weighted_interval([(0.5, x[mask], cluster[mask]) for mask in masks]) if len(masks) == 2 else None


def weighted_interval(means: Sequence[tuple[float, np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """`clustered_interval` of a weighted sum of means, which may be over values of the same clusters.

    Resamples without any value of one of the means are left out.

    Args:
        means: (weight, (n,) values, (n,) their clusters) of each.

    Returns:
        (low, high), or None if there are fewer than two clusters, or a mean is over nothing.
    """
    cluster = np.unique(np.concatenate([np.zeros(0, int), *(of_mean for _, _, of_mean in means)]))
    clusters = len(cluster)
    if clusters < 2 or not all(len(x) for _, x, _ in means):
        return None
    weights = np.array([weight for weight, _, _ in means])
    totals, counts = np.zeros((2, clusters, len(means)))
    for i, (_, x, of_mean) in enumerate(means):
        index = np.searchsorted(cluster, of_mean)
        totals[:, i], counts[:, i] = np.bincount(index, x, clusters), np.bincount(index, minlength=clusters)
    generator = np.random.default_rng(SEED)
    # Draw in chunks of at most about 4M indices, so that memory stays bounded for any number of clusters.
    chunk = max(1, 2**22 // clusters)
    sums = []
    for start in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - start)
        drawn = generator.integers(0, clusters, (rows, clusters)) + clusters * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters)  # each cluster is drawn
        with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has nothing of a mean
            sums.append(((times @ totals) / (times @ counts)) @ weights)
    low, high = np.nanquantile(np.concatenate(sums), [0.025, 0.975])
    return float(low), float(high)


def paired_test(ours: np.ndarray, baseline: np.ndarray, cluster: np.ndarray) -> dict:
    """Compare two models on the same n pairs: McNemar's exact test, and the difference of their accuracies.

    McNemar's test uses the pairs on which the models differ (a tie and a correct answer differ, too) and assumes that
    pairs are independent. The bootstrap interval of the difference does not.

    Args:
        ours: (n,) correctness of our model: 1 correct, 0 wrong, 0.5 a tie.
        baseline: (n,) correctness of the baseline.
        cluster: (n,) the conversation of each pair.
    """
    better, worse = int((ours > baseline).sum()), int((ours < baseline).sum())
    return {
        "n": len(ours),
        "better": better,
        "worse": worse,
        "mcnemar_p": sign_test(better, worse),
        "difference": mean(ours - baseline),
        "difference_ci95_clustered": clustered_interval(ours - baseline, cluster),
    }


def sign_test(a: int, b: int) -> float:
    """The exact two-sided p-value of a successes and b failures under p = 1/2.

    For a + b discordant pairs this is McNemar's exact test.
    """
    n = a + b
    # Binomial coefficients in log space: they overflow a float from n of about 1,000.
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(a, b) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def quantiles(x: np.ndarray) -> dict | None:
    """Minimum, 5 %, quartiles, 95 % and maximum of (n,) values."""
    if not len(x):
        return None
    levels = {"min": 0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}
    return dict(zip(levels, np.quantile(x, list(levels.values())).tolist(), strict=True))


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of two (n,) arrays, None if one of them is constant."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def average_ranks(x: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1; equal values share the mean of their ranks.

    Pearson's correlation of such ranks is Spearman's correlation.
    """
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    # cumsum(counts) is the highest rank among equal values; the mean is (counts - 1) / 2 below it.
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
