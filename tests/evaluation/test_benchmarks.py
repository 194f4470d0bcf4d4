"""rm.evaluation.benchmarks: RewardBench 1 and 2 scores, compared with values worked out by hand."""

import numpy as np
import pytest

from rm.data.schemas import preference
from rm.evaluation import benchmarks
from tests.scored import pairs, scored


def test_rewardbench_1_weights_subsets_by_the_published_counts():
    subset = ["alpacaeval-easy"] * 4 + ["mt-bench-med"] * 2 + ["math-prm"] * 2 + ["hep-cpp"]
    wins = [1, 1, 1, 0, 1, 0, 1, 1, 0]
    result = benchmarks.rewardbench_scores(pairs([[win, 0.5] for win in wins], subset=subset), [""] * 9)
    assert result["version"] == 1
    assert result["sections"]["Chat"] == pytest.approx((100 * 0.75 + 40 * 0.5) / 140)
    assert result["sections"]["Reasoning"] == pytest.approx(984 / (984 + 164))
    assert result["score"] == pytest.approx(np.mean([*result["sections"].values()]))
    assert len(result["absent"]) == 23 - 4 and "donotanswer" in result["absent"]


def test_rewardbench_1_math_has_the_weight_of_all_code_subsets():
    reasoning = benchmarks.SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(n for name, n in reasoning.items() if name != "math-prm")
    assert [len(section) for section in benchmarks.SECTIONS.values()] == [5, 6, 5, 7]


def test_rewardbench_2_is_best_of_four_and_shares_ties():
    data = scored([[3, 1, 2, 0], [3, 3, 2, 0], [0, 1, 2, 3]], [[1, 0, 0, 0]] * 3, subset=["Math", "Math", "Precise IF"])
    result = benchmarks.rewardbench_scores(data, ["1", "2", "3"])
    assert result["version"] == 2 and result["sections"] == {"Precise IF": 0.0, "Math": 0.75}
    assert result["score"] == 0.375 and result["absent"] == ["Factuality", "Focus", "Safety", "Ties"]


def test_ties_score_rewards_gaps_larger_than_the_spread():
    rewards = [[5, 1, 0, 0], [2, 1, 0, 0], [4, 3.5, 1, 0], [2, 1, 1.5, 0]]  # reference gaps 4, 1; tied gaps 2.5, -0.5
    grades = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]  # spreads of the tied prompts: 0.5, 1
    data = scored(rewards, grades, subset=["Ties"] * 4)
    smooth = (np.tanh(2.5 / 0.5 - 1) + np.tanh(-0.5 / 1 - 1)) / 2
    expected = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * smooth
    result = benchmarks.rewardbench_scores(data, ["ref:0", "ref:1", "tied:0", "tied:1"])
    assert result["sections"]["Ties"] == pytest.approx(expected)
    # No tied prompt has a reference prompt: only the two accuracies are left.
    assert benchmarks.ties_score(data, ["ref:0", "ref:1", "tied:7", "tied:8"]) == pytest.approx(0.3 * 1.5)


def test_rewardbench_scores_of_any_other_set_are_none():
    assert benchmarks.rewardbench_scores(pairs([[1, 0]], subset=["Math"]), [""]) is None  # pairs, not best of four
    assert benchmarks.rewardbench_scores(pairs([[1, 0]] * 2, subset=["hep-cpp", "mine"]), [""] * 2) is None
    assert benchmarks.rewardbench_scores(pairs([[1, 0]]), [""]) is None
    assert benchmarks.rewardbench_scores(scored([], []), []) is None


def test_rewardbench_2_records_are_read_as_rankings():
    record = {"prompt": "1 + 1?", "chosen": ["2", "two"], "rejected": ["3", "4"], "subset": "Ties", "id": "tied:0"}
    sample = preference(record)
    assert sample.written() == ["1 + 1?2", "1 + 1?two", "1 + 1?3", "1 + 1?4"] and sample.grade == [1, 1, 0, 0]
    assert sample.dialogues()[1][-1] == {"role": "assistant", "content": "two"}
