"""rm.evaluation.results: from records and rewards to report.json, scores.jsonl and the HTML page."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rm.data.examples import Example, Examples
from rm.evaluation.results import Result, ensemble, evaluation_report
from rm.report import evaluation
from tests.html_tags import Tags

HH = "\n\nHuman: {}\n\nAssistant: {}"


def pair(question: str, chosen: str, rejected: str, **more) -> dict:
    return {"chosen": HH.format(question, chosen), "rejected": HH.format(question, rejected)} | more


def build_examples(counts: list[int], record=None, label=None, grade=None) -> Examples:
    """Examples with these numbers of replies; every prefix and reply is one token."""
    token, loss = np.zeros(1, np.int32), np.zeros(1, bool)
    examples = []
    for i, count in enumerate(counts):
        example = Example(
            token,
            (token,) * count,
            (loss,) * count,
            grade=None if grade is None else grade[i],
            label=1.0 if label is None else label[i],
        )
        examples.append(example)
    return Examples.build(examples, record)


def result(tmp_path, records: list[dict], rewards, record=None, name="a.jsonl", **more) -> Result:
    """Rewards of the records with the numbers `record` (default: all) of a new file; `more` as in build_examples."""
    (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
    kept = record or range(len(records))
    counts = [len(records[i]["responses"]) if "responses" in records[i] else 2 for i in kept]
    return Result([tmp_path / name], build_examples(counts, kept, **more), np.array(rewards, np.float32))


def test_record_info_is_that_of_the_records_that_were_kept(tmp_path):
    second_turn = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant: {}"
    records = [
        pair("a?", "yes", "nope", subset="one", id="first"),
        pair("dropped", "x", "y"),
        {"chosen": second_turn.format("d"), "rejected": second_turn.format("ee")},
        {"chosen": "no turns", "rejected": "no turns at all"},
    ]
    first, second, third = result(tmp_path, records, [1, 0] * 3, record=[0, 2, 3]).record_info
    assert (first.id, first.subset, first.turns, first.lengths) == ("first", "one", 1, [3, 4])
    assert (second.id, second.subset, second.turns, second.lengths) == (3, "", 2, [1, 2])
    assert (third.turns, third.lengths) == (0, [8, 15])


def test_scores_jsonl_has_one_line_per_record_in_file_order(tmp_path):
    records = [pair("a?", "yes", "nope"), {"prompt": "p", "responses": ["x", "yy", "zzz"], "ranks": [1, 2, 3]}]
    lines = list(result(tmp_path, records, [0.5, 0.25, 1, 2, 3]).lines())
    assert lines[0] == {"record": 1, "id": 1, "scores": [0.5, 0.25], "characters": [3, 4], "tokens": [2, 2]}
    assert lines[1] == {"record": 2, "id": 2, "scores": [1, 2, 3], "characters": [1, 2, 3], "tokens": [2, 2, 2]}


def test_a_record_that_was_left_out_has_a_line_with_the_reason(tmp_path):
    records = [pair("a?", "yes", "nope"), pair("long?", "x", "y", id="long"), pair("b?", "1", "22"), pair("c?", "", "")]
    of_two = result(tmp_path, records, [1, 0, 3, 2], record=[0, 2])
    lines = list(replace(of_two, dropped={1: "longer than 512", 3: "with empty text"}).lines())
    assert lines[1] == {"record": 2, "id": "long", "scores": None, "dropped": "longer than 512"}
    assert lines[3] == {"record": 4, "id": 4, "scores": None, "dropped": "with empty text"}
    assert [line["record"] for line in lines] == [1, 2, 3, 4]
    assert (lines[0]["scores"], lines[2]["scores"], lines[2]["characters"]) == ([1, 0], [3, 2], [1, 2])


def test_each_of_the_joined_records_of_a_prompt_has_a_line_with_the_score_of_its_reply(tmp_path):
    keys = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rated = [("a?", "x", 4), ("a?", "yy", 2), ("b?", "z", 1), ("b?", "zz", 3)]
    records = [{"prompt": p, "response": r} | dict.fromkeys(keys, score) for p, r, score in rated]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    joined = Result([file], build_examples([2], [0]), np.array([5, 7], np.float32), dropped={2: "longer than 512"})
    one = {"characters": [1], "tokens": [2]}
    assert list(joined.lines()) == [
        {"record": 1, "id": 1, "scores": [5]} | one,
        {"record": 2, "id": 2, "scores": [7]} | one | {"characters": [2]},
        {"record": 3, "id": 3, "scores": None, "dropped": "longer than 512"},
        {"record": 4, "id": 4, "scores": None, "dropped": "longer than 512"},
    ]
    assert [line["record"] for line in joined.best()] == [1]


def test_check_finite_names_the_file_and_record_of_a_nan_reward(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: the reward of reply 2 is nan, not a finite number"):
        result(tmp_path, [pair("a?", "b", "c")] * 3, [1, 0, 1, np.nan], record=[0, 2]).check_finite()
    result(tmp_path, [pair("a?", "b", "c")], [1, 0]).check_finite()


def test_label_below_one_half_exchanges_the_sides_and_one_half_is_a_tie(tmp_path):
    scored = result(tmp_path, [pair("a?", "b", "c")] * 3, [2, 1] * 3, label=[0.9, 0.2, 0.5]).scored
    assert scored.margin.tolist() == [1, -1]


def test_evaluation_report_pools_the_pairs_of_all_sets(tmp_path):
    first = result(tmp_path, [pair("a?", "b", "c")] * 3, [1, 0] * 3, name="a.jsonl")
    second = result(tmp_path, [pair("d?", "b", "c")], [0, 1], name="b.jsonl")
    report = evaluation_report({"a": first, "b": second}, {})
    assert (report["n"], report["accuracy"]) == (4, 0.75)
    assert report["sets"]["a"]["accuracy"] == 1 and report["sets"]["b"]["accuracy"] == 0
    assert report["accuracy_ci95"][0] < 0.75 < report["accuracy_ci95"][1]
    json.dumps(report, allow_nan=False)


def test_evaluation_report_compares_models_on_the_records_both_kept(tmp_path):
    records = [pair(f"{i}?", "b", "c") for i in range(5)]
    ours = result(tmp_path, records, [1, 0] * 4, record=[0, 1, 2, 4])
    baseline = result(tmp_path, records, [0, 1, 1, 0, 0, 1, 1, 0], record=[0, 2, 3, 4])
    report = evaluation_report({"a": ours}, {"a": baseline})
    assert report["baseline"] == report["sets"]["a"]["baseline"]
    assert (report["baseline"]["n"], report["baseline"]["better"], report["baseline"]["worse"]) == (3, 1, 0)


def test_mistakes_are_sorted_by_margin_with_one_per_prompt(tmp_path):
    ranking = {"prompt": "p", "responses": ["best", "mid", "bad"], "scores": [3, 2, 1], "id": "r"}
    records = [pair("a?", "good", "bad"), ranking, pair("fine?", "b", "c")]
    grades = [[1, 0], [3, 2, 1], [1, 0]]
    mistakes = result(tmp_path, records, [0, 1, -5, 0, 5, 1, 0], grade=grades).mistakes()
    assert [mistake.id for mistake in mistakes] == ["r", 1] and mistakes[0].rewards == (-5, 5)
    assert mistakes[0].better[-1]["content"] == "best" and mistakes[0].worse[-1]["content"] == "bad"
    assert mistakes[1].better == [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "good"}]


def test_evaluation_page_escapes_markup_in_records_and_settings(tmp_path):
    markup = "<script>alert('x')</script></details>"
    records = [pair(markup, markup + "1", markup + "2", subset=markup, id=markup), pair("plain?", "a", "b")]
    sets = {markup: result(tmp_path, records, [0, 1, 2, 0])}
    report = evaluation_report(sets, sets) | {"settings": {"dataset_path": [markup]}}
    page = Tags(evaluation.evaluation_page(report, sets))
    assert "script" not in {tag for tag, _ in page.tags} and page.text.count(markup) >= 5
    assert "0.5000" in "".join(evaluation.terminal_table(report))


def test_evaluation_page_of_a_set_without_pairs_shows_dashes(tmp_path):
    sets = {"empty": result(tmp_path, [pair("a?", "b", "c")], [1, 0], label=[0.5])}
    report = evaluation_report(sets, {})
    assert report["n"] == 0 and report["accuracy"] is None
    Tags(evaluation.evaluation_page(report, sets))
    assert "–" in "".join(evaluation.terminal_table(report))


def test_an_ensemble_is_over_the_records_that_all_models_have_scored(tmp_path):
    records = [{"prompt": "a", "responses": ["b", "c", "d"][:k], "ranks": [1, 2, 3][:k]} for k in (2, 3, 2, 3)]
    first = result(tmp_path, records, [1, 2, 3, 4, 5, 6, 7, 8], record=[0, 1, 3])
    second = result(tmp_path, records, [30, 50, 70, 0, 0, 10, 20, 60], record=[1, 2, 3])
    first, second = replace(first, dropped={2: "longer than 512"}), replace(second, dropped={0: "with empty text"})
    both = ensemble([first, second], [(1, 2), (10, 20)])
    assert both.examples.record.tolist() == [1, 3] and [info.id for info in both.record_info] == [2, 4]
    of_first, of_second = (np.array([3, 4, 5, 6, 7, 8]) - 1) / 2, (np.array([30, 50, 70, 10, 20, 60]) - 10) / 20
    np.testing.assert_allclose(both.rewards, (of_first + of_second) / 2)
    assert [line.get("dropped") for line in both.lines()] == ["with empty text", None, "longer than 512", None]
    as_they_are = ensemble([first, second], [(1, 2), None])
    np.testing.assert_allclose(as_they_are.rewards, np.mean([[3, 4, 5, 6, 7, 8], [30, 50, 70, 10, 20, 60]], 0))
