"""rm.evaluation.stats compared with scipy, and on cases with known results."""

import numpy as np
import pytest

from rm.evaluation.stats import (
    RESAMPLES,
    SEED,
    average_ranks,
    balanced_interval,
    clustered_interval,
    paired_test,
    pearson,
    sign_test,
    weighted_interval,
    wilson_interval,
)

scipy_stats = pytest.importorskip("scipy.stats")


def test_wilson_interval_equals_published_examples_and_scipy():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=5e-5)
        expected = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_clustered_interval_of_single_pairs_is_scipys_bootstrap():
    x = np.random.default_rng(0).integers(0, 2, 300).astype(float)
    expected = scipy_stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert clustered_interval(x, np.arange(300)) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_clustered_interval_does_not_narrow_when_pairs_are_duplicated():
    x = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    copies, cluster = np.repeat(x, 4), np.repeat(np.arange(100), 4)  # four times the pairs, no more information
    clustered = clustered_interval(copies, cluster)
    assert clustered == pytest.approx(clustered_interval(x, np.arange(100)), abs=1e-12)
    low, high = clustered_interval(copies, np.arange(400))  # wrongly assumes that copies are independent
    assert high - low < 0.6 * np.ptp(clustered)


def test_clustered_interval_is_deterministic_and_none_for_one_cluster():
    x, cluster = np.random.default_rng(0).random(50), np.arange(50) // 2
    assert clustered_interval(x, cluster) == clustered_interval(x, cluster)
    assert clustered_interval(x[::-1], cluster) is not None
    assert clustered_interval(x, np.zeros(50, int)) is None and clustered_interval(x[:0], cluster[:0]) is None


def test_the_interval_of_a_weighted_sum_is_that_of_its_sums_over_resampled_clusters():
    random = np.random.default_rng(0)
    means = [(weight, random.random(n), random.integers(0, 9, n)) for weight, n in ((0.25, 40), (0.7, 25))]
    drawn = np.random.default_rng(SEED).integers(0, 9, (RESAMPLES, 9))
    sums = []
    for clusters in drawn:
        of_means = [np.concatenate([x[cluster == c] for c in clusters]) for _, x, cluster in means]
        sums.append(0.25 * of_means[0].mean() + 0.7 * of_means[1].mean())
    assert weighted_interval(means) == pytest.approx(np.quantile(sums, [0.025, 0.975]), abs=1e-12)
    assert weighted_interval([]) is None


def test_sign_test_is_the_exact_binomial_test():
    for a, b in ((0, 0), (1, 0), (3, 9), (40, 40), (600, 700), (0, 2000)):
        expected = scipy_stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert sign_test(a, b) == pytest.approx(expected, rel=1e-9)


def test_paired_test_compares_two_models_on_the_same_pairs():
    ours, baseline = np.array([1, 1, 0.5, 0, 1, 1.0]), np.array([1, 0, 0, 0, 0, 1.0])
    result = paired_test(ours, baseline, np.arange(6))
    assert (result["better"], result["worse"], result["n"]) == (3, 0, 6)
    assert result["mcnemar_p"] == pytest.approx(0.25) and result["difference"] == pytest.approx(2.5 / 6)
    low, high = result["difference_ci95_clustered"]
    assert 0 <= low < result["difference"] < high
    assert paired_test(ours, ours, np.arange(6))["mcnemar_p"] == 1.0


def test_correlations_equal_scipys_and_are_none_for_constants():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 9, 200).astype(float), generator.random(200)
    assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert pearson(average_ranks(x), average_ranks(y)) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    np.testing.assert_array_equal(average_ranks(x), scipy_stats.rankdata(x))
    assert pearson(np.ones(3), np.arange(3.0)) is None and pearson(x[:0], y[:0]) is None


def test_balanced_interval_is_scipys_bootstrap_of_the_mean_of_two_means():
    random = np.random.default_rng(0)
    x, sign = random.random(200) < 0.7, random.choice([-1, 0, 1], 200, p=[0.2, 0.1, 0.7])

    def balanced(i):
        return (x[i][sign[i] > 0].mean() + x[i][sign[i] < 0].mean()) / 2

    expected = scipy_stats.bootstrap(
        (np.arange(200),), balanced, n_resamples=2000, method="percentile", rng=1, vectorized=False
    ).confidence_interval
    got = balanced_interval(x.astype(float), sign, np.arange(200))
    assert got == pytest.approx((expected.low, expected.high), abs=0.015)
    assert balanced_interval(x.astype(float), abs(sign), np.arange(200)) is None
    assert balanced_interval(x.astype(float), sign, np.zeros(200)) is None
