"""rm.evaluation.lists compared with scipy, scikit-learn and draws of n replies, with ties on both sides."""

import itertools
import json

import numpy as np
import pytest

from rm.evaluation.lists import best_of_n, kendall_tau_b, list_report, ndcg
from rm.evaluation.stats import clustered_interval
from tests.scored import scored

scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def prompts(count: int, most: int = 6):
    """(rewards, grades) of prompts with 3 replies and more, with ties in both."""
    random = np.random.default_rng(0)
    for _ in range(count):
        k = random.integers(3, most + 1)
        grade = random.integers(0, 4, k).astype(float)
        grade[0] = grade[1:].max() + 1  # not all graded alike
        yield random.integers(0, 4, k).astype(float), random.permutation(grade)


def test_tau_b_is_scipys():
    for rewards, grade in prompts(200):
        expected = scipy_stats.kendalltau(rewards, grade, variant="b").statistic
        assert kendall_tau_b(rewards, grade) == pytest.approx(0 if np.isnan(expected) else expected, abs=1e-12)
    assert kendall_tau_b(np.ones(3), np.arange(3.0)) == 0


def test_ndcg_is_scikit_learns_of_the_number_of_lower_grades():
    for rewards, grade in prompts(200):
        gain = [len({other for other in grade if other < one}) for one in grade]
        assert ndcg(rewards, grade) == pytest.approx(sklearn_metrics.ndcg_score([gain], [rewards]), abs=1e-12)
        assert ndcg(rewards, 10 * grade - 3) == pytest.approx(ndcg(rewards, grade), abs=1e-12)


def test_best_of_n_is_the_mean_over_all_draws_of_n_replies():
    for rewards, grade in prompts(60, most=5):
        for n in range(1, len(rewards) + 1):
            chosen, best = [], []
            for draw in itertools.combinations(range(len(rewards)), n):
                draw = list(draw)
                top = rewards[draw] == rewards[draw].max()  # of several, one at random
                chosen.append(grade[draw][top].mean())
                best.append(grade[draw].max())
            # What is drawn at random among ties is the same over all draws.
            assert best_of_n(rewards, grade, n) == pytest.approx((np.mean(chosen), np.mean(best)), abs=1e-12)


def test_the_report_has_means_over_prompts_with_intervals_over_conversations():
    of_prompt = list(prompts(30))
    rewards, grade = ([one[i].tolist() for one in of_prompt] for i in (0, 1))
    conversation = [i // 2 for i in range(30)]
    # Pairs, and rankings of equal grades, do not count.
    data = scored([*rewards, [1, 2], [1, 2, 3]], [*grade, [1, 0], [5, 5, 5]], conversation=[*conversation, 90, 91])
    report = list_report(data)
    taus = np.array([kendall_tau_b(*one) for one in of_prompt])
    assert report["prompts"] == 30 and report["kendall_tau_b"] == pytest.approx(taus.mean())
    assert report["kendall_tau_b_ci95_clustered"] == clustered_interval(taus, np.array(conversation))
    sizes = np.array([len(one) for one in rewards])
    assert [(row["n"], row["prompts"]) for row in report["best_of_n"]] == [(n, (sizes >= n).sum()) for n in (2, 4, 6)]
    for row in report["best_of_n"]:
        low, high = row["regret_ci95_clustered"]
        assert row["regret"] == pytest.approx(row["best_grade"] - row["grade"]) and low <= row["regret"] <= high
    json.dumps(report, allow_nan=False)


def test_a_perfect_order_has_no_regret_and_a_set_of_pairs_has_no_lists():
    report = list_report(scored([[3, 2, 1]] * 4, [[0.9, 0.5, 0.1]] * 4))
    assert (report["kendall_tau_b"], report["ndcg"], report["best_of_n"][-1]["regret"]) == (1, 1, 0)
    assert list_report(scored([[1, 0]] * 3, [[1, 0]] * 3)) is None and list_report(scored([], [])) is None
