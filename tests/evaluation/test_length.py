"""rm.evaluation.length: monotone rules of length are shown by one control, other rules by the second."""

import numpy as np
import pytest

from rm.evaluation.length import bradley_terry_scores, length_report
from tests.scored import pairs

linear_model = pytest.importorskip("sklearn.linear_model")


def rewards_by_length(rule, truth, n: int = 1500):
    """Pairs with rewards that are a rule of length; which reply is the better one, another function of length says."""
    lengths = np.random.default_rng(0).integers(1, 900, (n, 2))
    lengths = np.take_along_axis(lengths, np.argsort(-truth(lengths), axis=1), 1)
    return pairs(rule(lengths).tolist(), lengths=lengths.tolist())


def middle(length):
    return -abs(length - 450) / 100


def mostly(rule):
    return lambda length: rule(length) + 1.5 * np.random.default_rng(1).normal(size=length.shape)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_monotone_rule_has_a_controlled_accuracy_of_one_half(sign):
    report = length_report(rewards_by_length(lambda length: sign * length, mostly(lambda length: length / 100)))
    assert report["controlled_accuracy"] == 0.5 and report["controlled_accuracy_ci95_clustered"] == (0.5, 0.5)
    assert report["rule_controlled_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_a_rule_that_likes_middle_lengths_passes_the_first_control_and_not_the_second():
    data = rewards_by_length(middle, mostly(middle))
    report, accuracy = length_report(data), (data.margin > 0).mean()
    assert accuracy > 0.7 and report["rule_accuracy"] == pytest.approx(accuracy, abs=0.03)
    assert report["controlled_accuracy"] == pytest.approx(accuracy, abs=0.03)
    assert report["longest_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert report["rule_controlled_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_a_model_that_does_not_look_at_length_keeps_its_accuracy():
    random = np.random.default_rng(0)
    rewards, lengths = random.normal(size=(2000, 2)) + [1.5, 0], random.integers(1, 900, (2000, 2))
    report = length_report(pairs(rewards.tolist(), lengths=lengths.tolist()))
    accuracy = (rewards[:, 0] > rewards[:, 1]).mean()
    assert report["controlled_accuracy"] == pytest.approx(accuracy, abs=0.02)
    assert report["rule_controlled_accuracy"] == pytest.approx(accuracy, abs=0.02)
    assert report["rule_accuracy"] == pytest.approx(0.5, abs=0.05)
    for name in ("controlled_accuracy", "rule_controlled_accuracy"):
        low, high = report[f"{name}_ci95_clustered"]
        assert low < report[name] < high and high - low < 0.06


def test_the_scores_of_bins_are_scikit_learns_logistic_regression():
    random = np.random.default_rng(0)
    better, worse = random.integers(0, 6, (2, 300))
    x = np.eye(6)[better] - np.eye(6)[worse]
    both = np.concatenate([x, -x])  # each pair and its mirror image, at half the weight
    model = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(both, [1] * 300 + [0] * 300, sample_weight=np.full(600, 0.5))
    np.testing.assert_allclose(bradley_terry_scores(better, worse, 6), model.coef_[0], atol=1e-5)
