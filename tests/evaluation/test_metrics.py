"""rm.evaluation.metrics against naive twins, scipy and scikit-learn, and on cases whose answers are known."""

import itertools
import json

import numpy as np
import pytest

from rm.evaluation import metrics
from rm.evaluation.metrics import Scored, details, summary

scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def scored(rewards, grades, lengths=None, conversation=None, turns=None, subset=None) -> Scored:
    """From lists of each prompt's replies."""
    n, counts = len(rewards), [len(r) for r in rewards]
    return Scored(
        rewards=np.array([x for r in rewards for x in r], np.float64),
        grade=np.array([x for g in grades for x in g], np.float32),
        length=np.array([x for part in lengths or [range(k) for k in counts] for x in part], np.int64),
        offsets=np.cumsum([0, *counts]),
        conversation=np.array(conversation or range(n)),
        turns=np.array(turns or [1] * n),
        subset=np.array(subset or [""] * n),
    )


def pairs(rewards, **cuts) -> Scored:
    return scored(rewards, [[1, 0]] * len(rewards), **cuts)


def random_pairs(n: int, seed: int = 0) -> Scored:
    draw = np.random.default_rng(seed)
    rewards = draw.normal(size=(n, 2)) + draw.integers(0, 2, (n, 1)) * [1, 0]
    lengths = draw.integers(1, 900, (n, 2))
    names = draw.choice(["a", "b"], n).tolist()
    return pairs(rewards.tolist(), lengths=lengths.tolist(), turns=draw.integers(1, 4, n).tolist(), subset=names)


def test_accuracy_counts_a_tie_half_and_loss_is_minus_log_sigmoid():
    got = summary(pairs([[2.0, 1.0], [0.0, 0.0], [1.0, 3.0]]))
    assert (got["n"], got["prompts"], got["accuracy"], got["top1"], got["ties"]) == (3, 3, 0.5, 0.5, 1)
    assert got["loss"] == pytest.approx(np.mean([-np.log(1 / (1 + np.exp(-m))) for m in (1.0, 0.0, -2.0)]))
    assert got["margin_mean"] == pytest.approx(-1 / 3)


def test_the_numbers_are_those_of_scipy_and_scikit_learn():
    data = random_pairs(400)
    got = summary(data) | details(data)
    chosen, rejected = data.rewards.reshape(-1, 2).T
    lengths = data.length.reshape(-1, 2)
    right = (chosen > rejected).astype(int)
    probability = 1 / (1 + np.exp(rejected - chosen))
    assert got["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(np.ones(400), right))
    assert got["loss"] == pytest.approx(sklearn_metrics.log_loss(np.ones(400), probability, labels=[0, 1]))
    assert got["length"]["pearson"] == pytest.approx(scipy_stats.pearsonr(data.rewards, data.length).statistic)
    assert got["length"]["spearman"] == pytest.approx(scipy_stats.spearmanr(data.rewards, data.length).statistic)
    within = [(x.reshape(-1, 2) - x.reshape(-1, 2).mean(1, keepdims=True)).ravel() for x in (data.rewards, data.length)]
    assert got["length"]["pearson_within_prompts"] == pytest.approx(scipy_stats.pearsonr(*within).statistic)
    assert got["length"]["spearman_within_prompts"] == pytest.approx(scipy_stats.spearmanr(*within).statistic)
    assert got["length"]["longest_accuracy"] == pytest.approx(
        np.mean((lengths[:, 0] > lengths[:, 1]) + (lengths[:, 0] == lengths[:, 1]) / 2)
    )
    assert got["accuracy_by"]["subset"]["a"]["accuracy"] == pytest.approx(right[data.subset == "a"].mean())
    assert got["accuracy_by"]["turns"]["2"]["n"] == (data.turns == 2).sum()
    for cut in got["accuracy_by"].values():
        assert sum(row["n"] for row in cut.values()) == 400
    json.dumps(got, allow_nan=False)


def test_calibration_is_scikit_learns_curve_and_guos_error():
    margin = np.random.default_rng(0).normal(0.4, 1.5, 2000)
    got = metrics.calibration(margin)
    confidence, right = 1 / (1 + np.exp(-np.abs(margin))), margin > 0
    from sklearn.calibration import calibration_curve

    share, predicted = calibration_curve(right, 2 * confidence - 1, n_bins=10)  # their bins go from 0 to 1
    filled = [b for b in got["reliability"] if b["n"]]
    np.testing.assert_allclose([b["accuracy"] for b in filled], share)
    np.testing.assert_allclose([b["confidence"] for b in filled], (predicted + 1) / 2)
    expected = sum(b["n"] * abs(s - (p + 1) / 2) for b, s, p in zip(filled, share, predicted, strict=True)) / 2000
    assert got["ece"] == pytest.approx(expected)


def test_the_fitted_temperature_is_the_logistic_regression_without_intercept():
    from sklearn.linear_model import LogisticRegression

    margin = np.random.default_rng(0).normal(1, 2, 500)
    both, label = np.concatenate([margin, -margin])[:, None], np.repeat([1, 0], 500)
    slope = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(both, label).coef_[0, 0]
    assert metrics.temperature(margin) == pytest.approx(1 / slope, rel=1e-4)
    assert metrics.calibration(margin)["loss_at_temperature"] < metrics.nll(margin).mean()


def test_no_temperature_where_the_best_is_zero_or_infinite():
    assert metrics.temperature(np.array([1.0, 2.0])) is None  # all right: the colder the better
    assert metrics.temperature(np.array([1.0, -2.0])) is None  # wrong on the whole: the hotter the better
    assert metrics.temperature(np.zeros(0)) is None and metrics.temperature(np.zeros(3)) is None


def test_rankings_are_all_pairs_that_differ_in_grade_by_a_naive_twin():
    draw = np.random.default_rng(0)
    counts = [2, 9, 3, 9, 4, 1]
    data = scored([draw.normal(size=k) for k in counts], [draw.integers(0, 4, k) for k in counts])
    margins, prompts = [], []
    for i in range(len(counts)):
        replies = range(data.offsets[i], data.offsets[i + 1])
        for a, b in itertools.combinations(replies, 2):
            if data.grade[a] != data.grade[b]:
                high, low = (a, b) if data.grade[a] > data.grade[b] else (b, a)
                margins.append(data.rewards[high] - data.rewards[low])
                prompts.append(i)
    assert data.margin.tolist() == margins and data.pairs[2].tolist() == prompts
    assert summary(data)["n"] == len(margins) and summary(data)["prompts"] == 6
    assert summary(data)["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_nine_replies_in_order_are_36_pairs_and_kendalls_tau():
    rewards = np.random.default_rng(1).normal(size=9)
    got = summary(scored([rewards.tolist()], [list(range(9))]))
    assert got["n"] == 36
    assert 2 * got["accuracy"] - 1 == pytest.approx(scipy_stats.kendalltau(rewards, np.arange(9)).statistic)
    assert got["accuracy_ci95_clustered"] is None  # one conversation says nothing of others


def test_top1_is_a_fair_draw_among_the_highest():
    data = scored([[3, 3, 1, 0], [1, 2, 0], [5, 5], [1, 1]], [[1, 0, 0, 0], [1, 2, 2], [0, 1], [0, 0]])
    chances = metrics.top1(data)
    assert chances[:3].tolist() == [0.5, 1.0, 0.5] and np.isnan(chances[3])
    assert summary(data)["top1"] == pytest.approx(2 / 3)


def test_all_ties_identical_pairs_a_single_pair_and_no_pair_have_an_answer():
    ties = pairs([[0.3, 0.3]] * 4)
    got = summary(ties) | details(ties)
    assert (got["accuracy"], got["ties"], got["calibration"]["ece"], got["calibration"]["temperature"]) == (
        0.5,
        4,
        0,
        None,
    )
    assert got["length"]["pearson"] is None
    one = pairs([[1.0, 0.0]])
    got = summary(one) | details(one)
    assert got["accuracy"] == 1.0 and 0 < got["accuracy_ci95"][0] < got["accuracy_ci95"][1] == 1.0
    assert got["length"]["accuracy_better_longer"] is None and got["length"]["controlled_accuracy"] is None
    same = pairs([[0.1, 0.7]] * 5, conversation=[3] * 5)
    assert summary(same)["accuracy"] == 0 and summary(same)["accuracy_ci95_clustered"] is None
    for none in (scored([[1.0, 2.0]], [[0, 0]]), scored([], [])):  # nothing to rank: null, not a crash
        got = summary(none) | details(none)
        assert got["n"] == 0 and got["accuracy"] is None and got["accuracy_ci95"] is None
        json.dumps(got, allow_nan=False)


def test_a_rule_of_length_alone_has_a_length_controlled_accuracy_of_one_half():
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 50, (300, 2))
    data = pairs((lengths * 0.1).tolist(), lengths=lengths.tolist())
    got = details(data)["length"]
    assert got["controlled_accuracy"] == 0.5 and got["spearman"] == pytest.approx(1)
    assert got["longest_accuracy"] == summary(data)["accuracy"]


def test_a_cut_by_length_puts_equal_lengths_in_a_bin_of_their_own():
    data = pairs([[1, 0]] * 7, lengths=[[0, 501], [0, 500], [0, 1], [5, 5], [1, 0], [101, 0], [501, 0]])
    rows = details(data)["accuracy_by"]["length_difference"]
    assert [row["n"] for row in rows.values()] == [1] * 7 and rows["0"]["n"] == 1
    data = pairs([[1, 0]] * 4, lengths=[[0, 101], [0, 100], [100, 0], [500, 0]])
    rows = details(data)["accuracy_by"]["length_difference"]
    assert [name for name, row in rows.items() if row["n"]] == ["-500…-101", "-100…-1", "1…100", "101…500"]


def test_constant_rewards_of_three_replies_have_no_correlation_within_prompts():
    got = details(scored([[0.1] * 3, [0.7] * 3], [[1, 0, 0]] * 2))["length"]
    assert got["pearson_within_prompts"] is None and got["spearman_within_prompts"] is None


def test_a_huge_margin_does_not_overflow():
    with np.errstate(over="raise"):
        data = pairs([[-1e4, 1e4], [1e4, -1e4]])
        assert summary(data)["loss"] == pytest.approx(1e4)
        assert details(data)["calibration"]["ece"] == pytest.approx(0.5)
