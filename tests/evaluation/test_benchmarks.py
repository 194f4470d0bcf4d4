"""rm.evaluation.benchmarks on sets made here: the weights of sections, best of four, and Ties worked out by hand."""

import numpy as np
import pytest

from rm.data.formats import preference
from rm.evaluation import benchmarks
from tests.evaluation.test_metrics import pairs, scored


def test_version_1_weighs_subsets_by_the_published_counts():
    subset = ["alpacaeval-easy"] * 4 + ["mt-bench-med"] * 2 + ["math-prm"] * 2 + ["hep-cpp"]
    wins = [1, 1, 1, 0, 1, 0, 1, 1, 0]
    got = benchmarks.scores(pairs([[win, 0.5] for win in wins], subset=subset), [""] * 9)
    assert got["version"] == 1
    assert got["sections"]["Chat"] == pytest.approx((100 * 0.75 + 40 * 0.5) / 140)
    assert got["sections"]["Reasoning"] == pytest.approx(984 / (984 + 164))
    assert got["score"] == pytest.approx(np.mean([*got["sections"].values()]))
    assert len(got["absent"]) == 23 - 4 and "donotanswer" in got["absent"]


def test_math_weighs_as_much_as_code():
    reasoning = benchmarks.SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(n for name, n in reasoning.items() if name != "math-prm")
    assert [len(section) for section in benchmarks.SECTIONS.values()] == [5, 6, 5, 7]


def test_version_2_is_best_of_four_with_a_tie_shared():
    data = scored([[3, 1, 2, 0], [3, 3, 2, 0], [0, 1, 2, 3]], [[1, 0, 0, 0]] * 3, subset=["Math", "Math", "Precise IF"])
    got = benchmarks.scores(data, ["1", "2", "3"])
    assert got["version"] == 2 and got["sections"] == {"Precise IF": 0.0, "Math": 0.75} and got["score"] == 0.375
    assert got["absent"] == ["Factuality", "Focus", "Safety", "Ties"]


def test_ties_rewards_gaps_wider_than_the_spread_of_right_replies():
    rewards = [[5, 1, 0, 0], [2, 1, 0, 0], [4, 3.5, 1, 0], [2, 1, 1.5, 0]]  # ref gaps 4, 1; tied gaps 2.5, -0.5
    grades = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]  # spreads 0.5, 1
    data = scored(rewards, grades, subset=["Ties"] * 4)
    smooth = (np.tanh(2.5 / 0.5 - 1) + np.tanh(-0.5 / 1 - 1)) / 2
    expected = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * smooth
    got = benchmarks.scores(data, ["ref:0", "ref:1", "tied:0", "tied:1"])
    assert got["sections"]["Ties"] == pytest.approx(expected)
    assert benchmarks.ties_score(data, ["ref:0", "ref:1", "tied:7", "tied:8"]) == pytest.approx(0.3 * 1.5)


def test_any_other_set_is_not_taken_for_the_benchmark():
    assert benchmarks.scores(pairs([[1, 0]], subset=["Math"]), [""]) is None  # pairs, not best of four
    assert benchmarks.scores(pairs([[1, 0]] * 2, subset=["hep-cpp", "mine"]), [""] * 2) is None
    assert benchmarks.scores(pairs([[1, 0]]), [""]) is None
    assert benchmarks.scores(scored([], []), []) is None


def test_records_of_version_2_are_rankings_of_their_lists():
    record = {"prompt": "1 + 1?", "chosen": ["2", "two"], "rejected": ["3", "4"], "subset": "Ties", "id": "tied:0"}
    sample = preference(record)
    assert sample.texts == ["1 + 1?2", "1 + 1?two", "1 + 1?3", "1 + 1?4"] and sample.grade == [1, 1, 0, 0]
    assert preference(record, as_messages=True).texts[1][-1] == {"role": "assistant", "content": "two"}
