"""rm.evaluation.stats against scipy, and on cases whose answers are known."""

import numpy as np
import pytest

from rm.evaluation.stats import clustered_mean, paired, pearson, ranks, sign_test, wilson

scipy_stats = pytest.importorskip("scipy.stats")


def test_wilson_interval_of_a_published_example():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)
        theirs = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_bootstrap_of_single_pairs_is_scipys():
    x = np.random.default_rng(0).integers(0, 2, 300).astype(float)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert clustered_mean(x, np.arange(300)) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_pairs_of_one_conversation_widen_the_interval_as_copies_would():
    x = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    copied = np.repeat(x, 4), np.repeat(np.arange(100), 4)  # four times the pairs, no more information
    assert clustered_mean(*copied) == pytest.approx(clustered_mean(x, np.arange(100)), abs=1e-12)
    naive = clustered_mean(copied[0], np.arange(400))
    assert naive[1] - naive[0] < 0.6 * np.ptp(clustered_mean(*copied))


def test_the_bootstrap_is_the_same_every_time_and_in_any_number_of_chunks(monkeypatch):
    x, cluster = np.random.default_rng(0).random(50), np.arange(50) // 2
    assert clustered_mean(x, cluster) == clustered_mean(x, cluster)
    assert clustered_mean(x[::-1], cluster) is not None
    assert clustered_mean(x, np.zeros(50, int)) is None and clustered_mean(x[:0], cluster[:0]) is None


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs():
    for a, b in ((0, 0), (1, 0), (3, 9), (40, 40), (600, 700), (0, 2000)):
        expected = scipy_stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert sign_test(a, b) == pytest.approx(expected, rel=1e-9)


def test_two_models_are_compared_on_the_same_pairs():
    ours, theirs = np.array([1, 1, 0.5, 0, 1, 1.0]), np.array([1, 0, 0, 0, 0, 1.0])
    got = paired(ours, theirs, np.arange(6))
    assert (got["better"], got["worse"], got["n"]) == (3, 0, 6)
    assert got["mcnemar_p"] == pytest.approx(0.25) and got["difference"] == pytest.approx(2.5 / 6)
    low, high = got["difference_ci95_clustered"]
    assert 0 <= low < got["difference"] < high
    assert paired(ours, ours, np.arange(6))["mcnemar_p"] == 1.0


def test_correlations_are_scipys_and_none_for_constants():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 9, 200).astype(float), draw.random(200)
    assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert pearson(ranks(x), ranks(y)) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    np.testing.assert_array_equal(ranks(x), scipy_stats.rankdata(x))
    assert pearson(np.ones(3), np.arange(3.0)) is None and pearson(x[:0], y[:0]) is None
