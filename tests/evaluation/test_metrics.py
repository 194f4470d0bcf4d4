"""rm.evaluation.metrics compared with naive implementations, scipy and scikit-learn, and with known results."""

import itertools
import json

import numpy as np
import pytest

from rm.evaluation import metrics
from rm.evaluation.length import length_report
from rm.evaluation.metrics import details, summary
from rm.evaluation.results import set_report
from tests.scored import pairs, random_pairs, scored

scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def test_summary_counts_a_tie_half_and_loss_is_minus_log_sigmoid():
    result = summary(pairs([[2.0, 1.0], [0.0, 0.0], [1.0, 3.0]]))
    assert (result["n"], result["prompts"], result["ties"]) == (3, 3, 1)
    assert (result["accuracy"], result["top1"]) == (0.5, 0.5)
    assert result["loss"] == pytest.approx(np.mean([-np.log(1 / (1 + np.exp(-m))) for m in (1.0, 0.0, -2.0)]))
    assert result["margin_mean"] == pytest.approx(-1 / 3)


def test_metrics_equal_those_of_scipy_and_scikit_learn():
    data = random_pairs(400)
    result = set_report(data)
    chosen, rejected = data.rewards.reshape(-1, 2).T
    correct = (chosen > rejected).astype(int)
    probability = 1 / (1 + np.exp(rejected - chosen))
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(np.ones(400), correct))
    assert result["loss"] == pytest.approx(sklearn_metrics.log_loss(np.ones(400), probability, labels=[0, 1]))

    length = result["length"]
    assert length["pearson"] == pytest.approx(scipy_stats.pearsonr(data.rewards, data.length).statistic)
    assert length["spearman"] == pytest.approx(scipy_stats.spearmanr(data.rewards, data.length).statistic)
    within = []
    for x in (data.rewards, data.length):
        by_prompt = x.reshape(-1, 2)
        within.append((by_prompt - by_prompt.mean(1, keepdims=True)).ravel())
    assert length["pearson_within_prompts"] == pytest.approx(scipy_stats.pearsonr(*within).statistic)
    assert length["spearman_within_prompts"] == pytest.approx(scipy_stats.spearmanr(*within).statistic)
    first, second = data.length.reshape(-1, 2).T
    assert length["longest_accuracy"] == pytest.approx(np.mean((first > second) + (first == second) / 2))

    accuracy_by = result["accuracy_by"]
    assert accuracy_by["subset"]["a"]["accuracy"] == pytest.approx(correct[data.subset == "a"].mean())
    assert accuracy_by["turns"]["2"]["n"] == (data.turns == 2).sum()
    for table in accuracy_by.values():
        assert sum(row["n"] for row in table.values()) == 400
    json.dumps(result, allow_nan=False)


def test_calibration_equals_scikit_learns_curve_and_the_ece_formula():
    margin = np.random.default_rng(0).normal(0.4, 1.5, 2000)
    result = metrics.calibration(margin)
    confidence, correct = 1 / (1 + np.exp(-np.abs(margin))), margin > 0
    from sklearn.calibration import calibration_curve

    # scikit-learn's bins are from 0 to 1, ours from 0.5 to 1.
    accuracy, rescaled_confidence = calibration_curve(correct, 2 * confidence - 1, n_bins=10)
    mean_confidence = (rescaled_confidence + 1) / 2
    filled = [b for b in result["reliability"] if b["n"]]
    np.testing.assert_allclose([b["accuracy"] for b in filled], accuracy)
    np.testing.assert_allclose([b["confidence"] for b in filled], mean_confidence)
    weights = np.array([b["n"] for b in filled]) / 2000
    assert result["ece"] == pytest.approx(np.sum(weights * np.abs(accuracy - mean_confidence)))


def test_fit_temperature_is_logistic_regression_without_intercept():
    from sklearn.linear_model import LogisticRegression

    margin = np.random.default_rng(0).normal(1, 2, 500)
    features, label = np.concatenate([margin, -margin])[:, None], np.repeat([1, 0], 500)
    slope = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(features, label).coef_[0, 0]
    assert metrics.fit_temperature(margin) == pytest.approx(1 / slope, rel=1e-4)
    assert metrics.calibration(margin)["loss_at_temperature"] < metrics.nll(margin).mean()


def test_fit_temperature_is_none_if_the_optimum_is_zero_or_infinite():
    assert metrics.fit_temperature(np.array([1.0, 2.0])) is None  # all correct: the optimum is 0
    assert metrics.fit_temperature(np.array([1.0, -2.0])) is None  # negative mean margin: the optimum is infinite
    assert metrics.fit_temperature(np.zeros(0)) is None and metrics.fit_temperature(np.zeros(3)) is None


def test_ranking_pairs_equal_those_of_a_naive_loop():
    generator = np.random.default_rng(0)
    counts = [2, 9, 3, 9, 4, 1]
    data = scored([generator.normal(size=k) for k in counts], [generator.integers(0, 4, k) for k in counts])
    margins, prompts = [], []
    for i in range(len(counts)):
        replies = range(data.offsets[i], data.offsets[i + 1])
        for a, b in itertools.combinations(replies, 2):
            if data.grade[a] != data.grade[b]:
                better, worse = (a, b) if data.grade[a] > data.grade[b] else (b, a)
                margins.append(data.rewards[better] - data.rewards[worse])
                prompts.append(i)
    assert data.margin.tolist() == margins and data.pairs[2].tolist() == prompts
    assert summary(data)["n"] == len(margins) and summary(data)["prompts"] == 6
    assert summary(data)["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_accuracy_of_a_ranking_of_nine_is_kendalls_tau_over_36_pairs():
    rewards = np.random.default_rng(1).normal(size=9)
    result = summary(scored([rewards.tolist()], [list(range(9))]))
    assert result["n"] == 36
    assert 2 * result["accuracy"] - 1 == pytest.approx(scipy_stats.kendalltau(rewards, np.arange(9)).statistic)
    assert result["accuracy_ci95_clustered"] is None  # undefined for a single conversation


def test_top1_selects_uniformly_among_the_highest_rewards():
    data = scored([[3, 3, 1, 0], [1, 2, 0], [5, 5], [1, 1]], [[1, 0, 0, 0], [1, 2, 2], [0, 1], [0, 0]])
    probability = metrics.top1(data)
    assert probability[:3].tolist() == [0.5, 1.0, 0.5] and np.isnan(probability[3])
    assert summary(data)["top1"] == pytest.approx(2 / 3)


def test_metrics_of_only_ties():
    data = pairs([[0.3, 0.3]] * 4)
    result = set_report(data)
    assert (result["accuracy"], result["ties"]) == (0.5, 4)
    assert (result["calibration"]["ece"], result["calibration"]["temperature"]) == (0, None)
    assert result["length"]["pearson"] is None


def test_metrics_of_a_single_pair():
    data = pairs([[1.0, 0.0]])
    result = set_report(data)
    assert result["accuracy"] == 1.0 and 0 < result["accuracy_ci95"][0] < result["accuracy_ci95"][1] == 1.0
    assert result["length"]["accuracy_better_longer"] is None and result["length"]["controlled_accuracy"] is None


def test_metrics_of_identical_pairs_of_one_conversation():
    data = pairs([[0.1, 0.7]] * 5, conversation=[3] * 5)
    assert summary(data)["accuracy"] == 0 and summary(data)["accuracy_ci95_clustered"] is None


@pytest.mark.parametrize("data", [scored([[1.0, 2.0]], [[0, 0]]), scored([], [])], ids=["equal grades", "no prompts"])
def test_metrics_without_any_pair_are_none(data):
    result = set_report(data)
    assert result["n"] == 0 and result["accuracy"] is None and result["accuracy_ci95"] is None
    json.dumps(result, allow_nan=False)


def test_controlled_accuracy_of_a_length_only_model_is_one_half():
    lengths = np.random.default_rng(0).integers(0, 50, (300, 2))
    data = pairs((lengths * 0.1).tolist(), lengths=lengths.tolist())
    result = length_report(data)
    assert result["controlled_accuracy"] == 0.5 and result["spearman"] == pytest.approx(1)
    assert result["longest_accuracy"] == summary(data)["accuracy"]


def test_length_difference_table_has_a_row_for_equal_lengths():
    data = pairs([[1, 0]] * 7, lengths=[[0, 501], [0, 500], [0, 1], [5, 5], [1, 0], [101, 0], [501, 0]])
    rows = details(data)["accuracy_by"]["length_difference"]
    assert [row["n"] for row in rows.values()] == [1] * 7 and rows["0"]["n"] == 1
    data = pairs([[1, 0]] * 4, lengths=[[0, 101], [0, 100], [100, 0], [500, 0]])
    rows = details(data)["accuracy_by"]["length_difference"]
    assert [name for name, row in rows.items() if row["n"]] == ["-500…-101", "-100…-1", "1…100", "101…500"]


def test_correlations_within_prompts_of_constant_rewards_are_none():
    result = length_report(scored([[0.1] * 3, [0.7] * 3], [[1, 0, 0]] * 2))
    assert result["pearson_within_prompts"] is None and result["spearman_within_prompts"] is None


def test_metrics_of_huge_margins_do_not_overflow():
    with np.errstate(over="raise"):
        data = pairs([[-1e4, 1e4], [1e4, -1e4]])
        assert summary(data)["loss"] == pytest.approx(1e4)
        assert details(data)["calibration"]["ece"] == pytest.approx(0.5)
