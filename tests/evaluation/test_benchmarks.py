"""rm.evaluation.benchmarks against the benchmarks' rules, written out reply by reply, on random rewards with ties."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rm.data.schemas import preference
from rm.evaluation import benchmarks
from rm.evaluation.benchmarks import benchmark_of, benchmark_report
from rm.evaluation.records import RecordInfo
from rm.evaluation.stats import sign_test
from tests.data.public_records import PREFERENCES
from tests.scored import pairs, scored


def info(schema: str = "", subset: str = "", **more) -> RecordInfo:
    return RecordInfo(more.pop("id", 0), subset, 1, [], schema, **more)


def of_subsets(subsets, ids=None) -> list[RecordInfo]:
    return [info(subset=subset, id=ids[i] if ids else i) for i, subset in enumerate(subsets)]


def report_of(data, records) -> dict:
    report = benchmark_report(benchmark_of(data, records))
    json.dumps(report, allow_nan=False)
    return report


def check(report: dict, name: str, score: float, sections: dict) -> None:
    assert report["name"] == name and report["score"] == pytest.approx(score, abs=1e-12)
    assert {part: row["score"] for part, row in report["sections"].items()} == pytest.approx(sections, abs=1e-12)
    for row in (report, *report["sections"].values()):
        low, high = row["ci95_clustered"]
        assert low <= row["score"] <= high


def random_rewards(counts, seed: int = 0) -> list[list[float]]:
    """Rewards of prompts with these numbers of replies: few values, so that many are equal."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 4, count).astype(float).tolist() for count in counts]


def test_rewardbench_weights_subsets_by_the_published_counts_and_counts_ties_as_wrong():
    subsets = [name for name in benchmarks.SUBSETS_1 for _ in range(7)]
    rewards = random_rewards([2] * len(subsets))
    accuracy = {}
    for name in benchmarks.SUBSETS_1:
        wins = [chosen > rejected for (chosen, rejected), of in zip(rewards, subsets, strict=True) if of == name]
        accuracy[name] = sum(wins) / 7
    expected = {}
    for section, weights in benchmarks.SECTIONS.items():
        expected[section] = sum(accuracy[name] * n for name, n in weights.items()) / sum(weights.values())
    report = report_of(pairs(rewards, subset=subsets), of_subsets(subsets))
    check(report, "RewardBench", sum(expected.values()) / 4, expected)
    assert report["absent"] == [] and report["prompts"] == 23 * 7


def test_rewardbench_leaves_out_what_a_file_lacks():
    subsets = ["alpacaeval-easy"] * 4 + ["mt-bench-med"] * 2 + ["math-prm"] * 2 + ["hep-cpp"]
    wins = [1, 1, 1, 0, 1, 0, 1, 1, 0]
    report = report_of(pairs([[win, 0.5] for win in wins], subset=subsets), of_subsets(subsets))
    assert report["sections"]["Chat"]["score"] == pytest.approx((100 * 0.75 + 40 * 0.5) / 140)
    assert report["sections"]["Reasoning"]["score"] == pytest.approx(984 / (984 + 164))
    assert report["score"] == pytest.approx(np.mean([one["score"] for one in report["sections"].values()]))
    assert len(report["absent"]) == 23 - 4 and "donotanswer" in report["absent"]


def test_the_published_table_of_rewardbench():
    reasoning = benchmarks.SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(n for name, n in reasoning.items() if name != "math-prm")
    assert [len(section) for section in benchmarks.SECTIONS.values()] == [5, 6, 5, 7]


def published_ties_score(prompts: dict) -> float:
    """The Ties of RewardBench 2. `prompts`: {(kind, number): (rewards of right replies, of wrong ones)}."""
    accurate = {"tied": [], "ref": []}
    for (kind, _), (right, wrong) in prompts.items():
        accurate[kind].append(min(right) > max(wrong))
    clear, clear_of_both, smooth = [], [], []
    for (kind, number), (right, wrong) in prompts.items():
        if kind == "tied" and ("ref", number) in prompts:
            (reference,), reference_wrong = prompts["ref", number]
            spread, gap = max(right) - min(right), min(right) - max(wrong)
            smaller = min(gap, reference - max(reference_wrong))
            clear.append(gap > spread)
            clear_of_both.append(smaller > spread)
            ratio = smaller / spread if spread else np.sign(smaller) * np.inf if smaller else np.nan
            smooth.append(0.0 if np.isnan(ratio) else np.tanh(ratio - 1))
    terms = [(0.3, accurate["tied"]), (0.3, accurate["ref"]), (0.2, clear), (0.2, clear_of_both), (0.01, smooth)]
    return sum(weight * np.mean(values) for weight, values in terms if values)


def test_rewardbench_2_shares_ties_for_the_highest_reward_and_scores_several_right_replies():
    kinds = ["Math"] * 30 + ["Focus"] * 20
    rewards, grades, ids = random_rewards([4] * 50), [[1, 0, 0, 0]] * 50, [str(i) for i in range(50)]
    expected = {}
    for name in ("Math", "Focus"):
        of_name = [r for r, kind in zip(rewards, kinds, strict=True) if kind == name]
        expected[name] = np.mean([(r[0] == max(r)) / r.count(max(r)) for r in of_name])
    ties = {}
    for number in range(25):
        for kind, right in (("tied", 3), ("ref", 1)):
            if (kind, number) != ("ref", 7):  # has no reference prompt
                (of_prompt,) = random_rewards([5], seed=2 * number + right)
                ties[kind, number] = of_prompt[:right], of_prompt[right:]
                rewards.append(of_prompt)
                grades = [*grades, [1] * right + [0] * (5 - right)]
                ids.append(f"{kind}:{number}")
    subsets = kinds + ["Ties"] * 49
    report = report_of(scored(rewards, grades, subset=subsets), of_subsets(subsets, ids))
    expected["Ties"] = published_ties_score(ties)
    check(report, "RewardBench 2", np.mean([*expected.values()]), expected)
    assert report["absent"] == ["Factuality", "Precise IF", "Safety"]


def test_ties_without_reference_prompts_have_the_accuracies_alone():
    rewards = [[5, 1, 0, 0], [2, 1, 0, 0], [4, 3.5, 1, 0], [2, 1, 1.5, 0]]  # reference gaps 4, 1; tied gaps 2.5, -0.5
    grades = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    records = of_subsets(["Ties"] * 4, ["ref:0", "ref:1", "tied:7", "tied:8"])
    report = report_of(scored(rewards, grades, subset=["Ties"] * 4), records)
    assert report["sections"]["Ties"]["score"] == pytest.approx(0.3 * 1.5)


def test_rm_bench_compares_nine_pairs_of_styles_and_averages_domains():
    domains = ["chat"] * 9 + ["code"] * 11 + ["math"] * 13 + ["safety-refuse"] * 8 + ["safety-response"] * 5
    rewards = random_rewards([6] * len(domains))
    of_domain = {}
    for domain in ("chat", "code", "math", "safety"):
        matrix = np.zeros((3, 3))
        chosen_ones = [r for r, name in zip(rewards, domains, strict=True) if name.startswith(domain)]
        for r in chosen_ones:
            for i in range(3):
                for j in range(3):
                    matrix[i][j] += (r[i] > r[3 + j]) / len(chosen_ones)
        hard, normal, easy = np.triu(matrix, 1).sum() / 3, np.diag(matrix).mean(), np.tril(matrix, -1).sum() / 3
        of_domain[domain] = {"hard": hard, "normal": normal, "easy": easy}
    expected = {domain: np.mean([*levels.values()]) for domain, levels in of_domain.items()}
    score = np.mean([*expected.values()])
    expected |= {level: np.mean([one[level] for one in of_domain.values()]) for level in ("hard", "normal", "easy")}
    data = scored(rewards, [[1, 1, 1, 0, 0, 0]] * len(domains), subset=domains)
    check(report_of(data, [info("RM-Bench", name) for name in domains]), "RM-Bench", score, expected)
    # The files of single domains have no key `domain`: their names say it.
    of_files = [info("RM-Bench", "alpacaeval", file=f"data/{name}_filtered.json") for name in domains]
    check(report_of(data, of_files), "RM-Bench", score, expected)


def test_judgebench_counts_a_pair_that_is_right_on_balance_over_both_orders():
    sources = ["mmlu-pro-law"] * 9 + ["livebench-reasoning"] * 7 + ["livebench-math"] * 6 + ["livecodebench"] * 4
    rewards = random_rewards([2] * len(sources))

    def is_right(better: float, worse: float) -> bool:
        balance = 0
        for a_is_better in (True, False):  # the two orders
            a, b = (better, worse) if a_is_better else (worse, better)
            balance += 1 if (a > b) == a_is_better else -1  # the benchmark's judge answers B where rewards are equal
        return balance > 0

    right = [is_right(*one) for one in rewards]
    names = {"knowledge": "mmlu", "reasoning": "livebench-r", "math": "livebench-m", "coding": "livecode"}
    expected = {}
    for section, start in names.items():
        expected[section] = np.mean([one for one, at in zip(right, sources, strict=True) if at.startswith(start)])
    records = [info("JudgeBench", source) for source in sources]
    check(report_of(pairs(rewards, subset=sources), records), "JudgeBench", np.mean(right), expected)


def test_rmb_wants_the_best_of_a_list_to_beat_all_others():
    records, rewards, expected = [], [], {}
    for schema, folder, title in (
        ("RMB pairs", "Pairwise_set", "pairs"),
        ("RMB best of n", "BoN_set", "best of n"),
    ):
        for goal in ("Helpfulness", "Harmlessness"):
            some = random_rewards([2] * 8 if title == "pairs" else [3, 4, 2, 5, 4, 3, 6], seed=len(records))
            records += [info(schema, f"{folder}/{goal}/Code/Data")] * len(some)
            rewards += some
            expected[f"{title} {goal.lower()}"] = np.mean([all(r[0] > other for other in r[1:]) for r in some])
    grades = [[1] + [0] * (len(r) - 1) for r in rewards]
    report = report_of(scored(rewards, grades), records)
    check(report, "RMB", np.mean([*expected.values()]), expected)
    assert report_of(scored(rewards[:8], grades[:8]), records[:8])["absent"] == list(expected)[1:]


def test_ppe_correctness_compares_its_sampled_pairs_and_averages_data_sets():
    random = np.random.default_rng(0)
    rewards, grades = random_rewards([8] * 30), random.integers(0, 2, (30, 8)).tolist()
    grades[0] = [1] * 8  # nothing to compare
    files = ["hub/datasets--lmarena-ai--PPE-MMLU-Pro-Best-of-K/a.parquet"] * 12 + ["ppe-math-best-of-k.json"] * 18
    records, won = [], {"MMLU-Pro": [], "MATH": []}
    for r, grade, file in zip(rewards, grades, files, strict=True):
        differ = [(i, j) for i in range(8) for j in range(8) if grade[i] != grade[j]]
        sampled = tuple(differ[n] for n in random.integers(0, len(differ), 5)) if differ else ()
        records.append(info("PPE correctness", file=file, compared=sampled))
        won["MATH" if "math" in file else "MMLU-Pro"] += [
            (r[i] > r[j]) if grade[i] else (r[j] > r[i]) for i, j in sampled
        ]
    expected = {name: np.mean(values) for name, values in won.items()}
    report = report_of(scored(rewards, grades), records)
    check(report, "PPE correctness", np.mean([*expected.values()]), expected)
    assert report["absent"] == ["GPQA", "IFEval", "MBPP-Plus"] and report["prompts"] == 29
    # A file without sampled pairs: all pairs.
    all_pairs = report_of(scored(rewards, grades), [replace(record, compared=None) for record in records])
    margins = [np.subtract.outer(np.array(r)[np.array(g) == 1], np.array(r)[np.array(g) == 0]).ravel()
               for r, g in zip(rewards[:12], grades[:12], strict=True)]  # fmt: skip
    assert all_pairs["sections"]["MMLU-Pro"]["score"] == pytest.approx(np.mean(np.concatenate(margins) > 0))


def test_ppe_preference_leaves_out_what_people_called_a_tie():
    rewards = random_rewards([2] * 40)
    grades = [[0, 0] if i % 4 == 0 else [1, 0] for i in range(40)]
    won = [chosen > rejected for i, (chosen, rejected) in enumerate(rewards) if i % 4]
    report = report_of(scored(rewards, grades), [info("PPE preference")] * 40)
    check(report, "PPE preference", np.mean(won), {})
    assert report["prompts"] == 30


def test_a_baseline_is_compared_on_every_score_by_conversation():
    sources = ["mmlu-pro-law"] * 30 + ["livecodebench"] * 20
    records = [info("JudgeBench", source) for source in sources]
    conversation = [i // 2 for i in range(50)]
    of = [pairs(random_rewards([2] * 50, seed), subset=sources, conversation=conversation) for seed in (1, 2)]
    both = tuple(benchmark_of(one, records) for one in of)
    report = benchmark_report(both[0], both)
    right = [(one.margin > 0).astype(float) for one in of]
    gain = np.bincount(conversation, right[0] - right[1])
    test = report["baseline"]
    assert test["score"] == pytest.approx(right[1].mean())
    assert test["difference"] == pytest.approx(report["score"] - test["score"])
    assert (test["better"], test["worse"]) == ((gain > 0).sum(), (gain < 0).sum())
    assert test["sign_test_p"] == pytest.approx(sign_test((gain > 0).sum(), (gain < 0).sum()))
    low, high = test["difference_ci95_clustered"]
    assert low < test["difference"] < high
    coding = report["sections"]["coding"]
    assert coding["baseline"]["difference"] == pytest.approx((right[0] - right[1])[30:].mean())
    few = [pairs(random_rewards([2] * 5, seed), subset=sources[:5]) for seed in (1, 2)]  # no coding in common
    lacking = benchmark_report(both[0], tuple(benchmark_of(one, records[:5]) for one in few))
    assert lacking["sections"]["coding"]["baseline"]["difference"] is None
    mean = benchmarks.mean_report([both[0], both[1]], [both, both[::-1]])
    assert mean["score"] == pytest.approx((report["score"] + test["score"]) / 2)
    assert mean["baseline"]["difference"] == pytest.approx(0) and mean["baseline"]["better"] == 0
    assert mean["baseline"]["sign_test_p"] is None  # of two means


def test_any_other_set_is_no_benchmark():
    def is_none(data, records) -> bool:
        return benchmark_of(data, records) is None

    assert is_none(pairs([[1, 0]], subset=["Math"]), of_subsets(["Math"]))  # pairs, not best of four
    assert is_none(pairs([[1, 0]] * 2, subset=["hep-cpp", "mine"]), of_subsets(["hep-cpp", "mine"]))
    assert is_none(pairs([[1, 0]]), of_subsets([""])) and is_none(scored([], []), [])
    assert is_none(pairs([[1, 0]] * 2), [info("JudgeBench"), info("chosen/rejected")])  # not all records
    of_three = scored([[1, 0, 1, 0, 1, 0]], [[1, 1, 1, 0, 0, 0]])
    assert is_none(of_three, [info("RM-Bench", "mine", file="data/mine.json")])  # of no domain


@pytest.mark.parametrize(
    ("name", "subset", "compared"),
    [
        ("RM-Bench", "chat", None),
        ("JudgeBench", "mmlu", None),
        ("RewardBench 2, Ties", "Ties", None),
        ("PPE correctness", "", ((0, 1),)),
    ],
)
def test_a_record_names_its_part_of_a_benchmark_and_what_is_compared(name, subset, compared):
    sample = preference(PREFERENCES[name][0])
    assert (sample.subset, sample.compared) == (subset, compared)


def test_sampled_pairs_that_are_no_pairs_of_replies_are_refused():
    record = PREFERENCES["PPE correctness"][0]
    for pairs_of in ([[0, 3]], [[0]], "x", [[0, True]]):
        with pytest.raises(ValueError, match="'sampled_conflict_pairs' is .*expected pairs of indices of 3 responses"):
            preference(record | {"sampled_conflict_pairs": pairs_of})
