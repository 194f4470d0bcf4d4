"""rm.evaluation.results: from records and rewards to the content of report.json, scores.jsonl and the page."""

import json

import numpy as np
import pytest

from rm.data.examples import Example, Examples
from rm.evaluation import results
from rm.evaluation.results import Result, named_sets
from rm.report import evaluation
from tests.report.test_html import Tags

HH = "\n\nHuman: {}\n\nAssistant: {}"


def pair(question: str, good: str, bad: str, **more) -> dict:
    return {"chosen": HH.format(question, good), "rejected": HH.format(question, bad)} | more


def made(counts: list[int], record=None, label=None, grade=None) -> Examples:
    """Examples with these numbers of replies, of one token each."""
    token, loss = np.zeros(1, np.int32), np.zeros(1, bool)
    rows = [
        Example(token, (token,) * k, (loss,) * k, grade=None if grade is None else grade[i],
                label=1.0 if label is None else label[i])
        for i, k in enumerate(counts)
    ]  # fmt: skip
    return Examples.build(rows, record)


def result(tmp_path, records: list[dict], rewards, record=None, name="a.jsonl", **more) -> Result:
    (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
    kept = record or range(len(records))
    counts = [len(records[i].get("responses", "xx")) for i in kept]
    return Result([tmp_path / name], made(counts, kept, **more), np.array(rewards, np.float32))


def test_a_set_is_named_after_its_file_where_that_says_enough(tmp_path):
    assert named_sets(["x/test.jsonl.gz", "online=y/b.json"]) == {"test": ["x/test.jsonl.gz"], "online": ["y/b.json"]}
    assert named_sets(["x/test.jsonl", "y/test.jsonl"]) == {
        "x/test.jsonl": ["x/test.jsonl"],
        "y/test.jsonl": ["y/test.jsonl"],
    }
    assert named_sets(["all=a.jsonl", "all=b.jsonl"]) == {"all": ["a.jsonl", "b.jsonl"]}
    odd = tmp_path / "lr=3.jsonl"
    odd.write_text("")
    assert named_sets([str(odd)]) == {"lr=3": [str(odd)]}


def test_facts_are_those_of_the_records_that_were_kept(tmp_path):
    later = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant: {}"
    records = [
        pair("a?", "yes", "nope", subset="one", id="first"),
        pair("dropped", "x", "y"),
        {"chosen": later.format("d"), "rejected": later.format("ee")},
        {"chosen": "no turns", "rejected": "no turns at all"},
    ]
    first, second, third = result(tmp_path, records, [1, 0] * 3, record=[0, 2, 3]).facts
    assert (first.id, first.subset, first.turns, first.lengths) == ("first", "one", 1, [3, 4])
    assert (second.id, second.subset, second.turns, second.lengths) == (2, "", 2, [1, 2])
    assert (third.turns, third.lengths) == (0, [8, 15])


def test_scores_jsonl_has_a_line_a_record_in_file_order(tmp_path):
    records = [pair("a?", "yes", "nope"), {"prompt": "p", "responses": ["x", "yy", "zzz"], "ranks": [1, 2, 3]}]
    lines = list(result(tmp_path, records, [0.5, 0.25, 1, 2, 3]).lines())
    assert lines[0] == {"record": 0, "id": 0, "scores": [0.5, 0.25], "characters": [3, 4], "tokens": [2, 2]}
    assert lines[1] == {"record": 1, "id": 1, "scores": [1, 2, 3], "characters": [1, 2, 3], "tokens": [2, 2, 2]}


def test_a_score_that_is_not_finite_names_its_file_and_record(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: the score of reply 2 is nan, not finite"):
        result(tmp_path, [pair("a?", "b", "c")] * 3, [1, 0, 1, np.nan], record=[0, 2]).check_finite()
    result(tmp_path, [pair("a?", "b", "c")], [1, 0]).check_finite()


def test_a_label_below_a_half_turns_the_pair_and_a_half_makes_a_tie(tmp_path):
    got = result(tmp_path, [pair("a?", "b", "c")] * 3, [2, 1] * 3, label=[0.9, 0.2, 0.5])
    assert got.scored.margin.tolist() == [1, -1]


def test_sets_are_pooled_by_pairs_not_averaged(tmp_path):
    first = result(tmp_path, [pair("a?", "b", "c")] * 3, [1, 0] * 3, name="a.jsonl")
    second = result(tmp_path, [pair("d?", "b", "c")], [0, 1], name="b.jsonl")
    got = results.report({"a": first, "b": second}, {})
    assert (got["n"], got["accuracy"]) == (4, 0.75)
    assert got["sets"]["a"]["accuracy"] == 1 and got["sets"]["b"]["accuracy"] == 0
    assert got["accuracy_ci95"][0] < 0.75 < got["accuracy_ci95"][1]
    json.dumps(got, allow_nan=False)


def test_a_baseline_is_compared_on_the_records_that_both_kept(tmp_path):
    records = [pair(f"{i}?", "b", "c") for i in range(5)]
    ours = result(tmp_path, records, [1, 0] * 4, record=[0, 1, 2, 4])
    theirs = result(tmp_path, records, [0, 1, 1, 0, 0, 1, 1, 0], record=[0, 2, 3, 4])
    got = results.report({"a": ours}, {"a": theirs})
    assert got["baseline"] == got["sets"]["a"]["baseline"]
    assert (got["baseline"]["n"], got["baseline"]["better"], got["baseline"]["worse"]) == (3, 1, 0)


def test_the_worst_mistakes_come_first_one_of_a_prompt_as_dialogues(tmp_path):
    ranking = {"prompt": "p", "responses": ["best", "mid", "bad"], "scores": [3, 2, 1], "id": "r"}
    records = [pair("a?", "good", "bad"), ranking, pair("fine?", "b", "c")]
    got = result(tmp_path, records, [0, 1, -5, 0, 5, 1, 0], grade=[[1, 0], [3, 2, 1], [1, 0]]).mistakes()
    assert [m.id for m in got] == ["r", 0] and got[0].rewards == (-5, 5)
    assert got[0].better[-1]["content"] == "best" and got[0].worse[-1]["content"] == "bad"
    assert got[1].better == [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "good"}]


def test_the_page_shows_mistakes_as_text_whatever_they_say(tmp_path):
    evil = "<script>alert('x')</script></details>"
    records = [pair(evil, evil + "1", evil + "2", subset=evil, id=evil), pair("plain?", "a", "b")]
    sets = {evil: result(tmp_path, records, [0, 1, 2, 0])}
    whole = results.report(sets, sets) | {"settings": {"dataset_path": [evil]}}
    seen = Tags(evaluation.evaluation_page(whole, sets))
    assert "script" not in {tag for tag, _ in seen.found} and seen.text.count(evil) >= 5
    assert "0.5000" in evaluation.terminal(whole)


def test_a_set_without_a_pair_to_rank_has_a_page_of_dashes(tmp_path):
    sets = {"empty": result(tmp_path, [pair("a?", "b", "c")], [1, 0], label=[0.5])}
    whole = results.report(sets, {})
    assert whole["n"] == 0 and whole["accuracy"] is None
    Tags(evaluation.evaluation_page(whole, sets))
    assert "–" in evaluation.terminal(whole)
