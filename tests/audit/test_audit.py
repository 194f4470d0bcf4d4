"""rm.audit: every flaw planted in crafted files is counted, and nowhere else; statuses; a slow twin; bad input."""

import itertools
import json
import runpy
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.audit import __main__
from tests.text_fixtures import byte_level

KEYS = ["positive", "negative", "chosen", "rejected", "prompt", "responses", "scores", "role", "content", "subset"]
COUNTER = itertools.count()


def dialogue(*contents: str, style: str = "###{}: {}") -> str:
    return "".join(style.format(("Human", "Assistant")[i % 2], said) for i, said in enumerate(contents))


def prompt(turns: int = 1) -> list[str]:
    """Turns that stand in no other dialogue, the last one the human's."""
    return [f"turn {next(COUNTER)}" for _ in range(2 * turns - 1)]


def pair(before: list[str], better: str = "a better one", worse: str = "worse", **more) -> dict:
    return {"positive": dialogue(*before, better), "negative": dialogue(*before, worse), **more}


def sound(n: int) -> list[dict]:
    return [pair(prompt(turns=i % 3 + 1)) for i in range(n)]


@pytest.fixture
def file(tmp_path):
    def write(records, name="pairs.json") -> str:
        (tmp_path / name).write_text(json.dumps({"instances": records}))
        return str(tmp_path / name)

    return write


def report(tmp_path, *argv) -> tuple[int, dict]:
    status = __main__.main([*map(str, argv), "--json", str(tmp_path / "report.json")])
    return status, json.loads((tmp_path / "report.json").read_text())


def counts(found: list[dict]) -> dict[str, int]:
    """What was found, by name: nothing that was not."""
    return {finding["name"]: finding["count"] for finding in found if finding["count"]}


# Within


def test_sound_pairs_have_no_findings(tmp_path, file, capsys):
    status, got = report(tmp_path, file(sound(20)), "--fail_on", "warning", "--split", "20")
    assert status == 0 and not counts(got["sets"][0]["findings"]) and not counts(got["across"])
    assert (got["sets"][0]["n"], got["sets"][0]["conversations"], got["held_out"]) == (20, 20, 4)
    assert capsys.readouterr().out.endswith("checks with findings: 0 of errors, 0 of warnings\n")


def continued(side: str) -> list[dict]:
    before = prompt()
    said = {"better": "a better one", "worse": "worse"}[side]
    return [pair(before), pair([*before, said, *prompt()])]


def twice(record: dict) -> list[dict]:
    return [record, dict(record)]


def swapped() -> list[dict]:
    record = pair(prompt())
    return [record, {"positive": record["negative"], "negative": record["positive"]}]


def both_go_on() -> list[dict]:
    """Nothing is given away: both replies have a record that goes on from them."""
    before = prompt()
    return [pair(before), pair([*before, "a better one", *prompt()]), pair([*before, "worse", *prompt()])]


def goes_on_from_its_other_side() -> list[dict]:
    one = dialogue(*prompt(), "yes")
    return [{"positive": one, "negative": one + dialogue("more?", "no")}]


def in_another_style() -> dict:
    sides = (dialogue("what?", " worse\n", "so", answer, style="\n\n{}: {}") for answer in "xy")
    return dict(zip(("chosen", "rejected"), sides, strict=True))


def of_messages() -> dict:
    contents = {"user": "why?", "assistant": "worse"}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    return {"prompt": [*messages, {"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}


FLAWS = {
    "label revealed": (lambda: [*continued("better"), *continued("better"), *continued("worse")], 3),
    "label revealed by another style": (lambda: [pair(["what?"]), in_another_style()], 1),
    "label revealed by messages": (lambda: [pair(["why?"]), of_messages()], 1),
    "identical": (lambda: [pair(prompt(), "same", "same"), pair(prompt(), "same ", "same")], 2),
    "swapped": (lambda: [*swapped(), *swapped()], 4),
    "duplicated": (lambda: [*twice(pair(prompt())), *twice(pair(prompt())), *twice(pair(prompt())) * 2], 5),
    "prompts differ": (lambda: [{"positive": dialogue(*prompt(), "a"), "negative": dialogue(*prompt(), "b")}], 1),
    "no reply": (lambda: [pair(prompt(), "", "b"), pair(prompt(), "a", " \n")], 2),
    "no turns": (lambda: [{"positive": "a text", "negative": "another"}], 1),
    "": (both_go_on, 0),
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_every_flaw_is_counted_as_often_as_it_was_planted_and_no_other_is(flaw, tmp_path, file, capsys):
    make, times = FLAWS[flaw]
    planted = make()
    records = sound(4) + planted[:1] + sound(3) + planted[1:]
    status, got = report(tmp_path, file(records), "--fail_on", "warning")
    name = flaw.partition(" by ")[0]
    assert counts(got["sets"][0]["findings"]) == ({name: times} if times else {})
    assert status == (1 if times else 0)
    (finding,) = [f for f in got["sets"][0]["findings"] if f["name"] == name] or [None]
    if finding:
        assert finding["share"] == times / len(records) and finding["severity"] == "warning"
        assert len(finding["where"]) == min(times, 5) and f"{name}: {times} (" in capsys.readouterr().out


def test_a_pair_one_side_of_which_goes_on_from_the_other_does_not_give_itself_away(tmp_path, file):
    _, got = report(tmp_path, file(goes_on_from_its_other_side()))
    assert counts(got["sets"][0]["findings"]) == {"prompts differ": 1}
    path = file(goes_on_from_its_other_side() * 2)  # but it does give away its duplicate
    _, got = report(tmp_path, path)
    where = [f"{path} record 1 (in {path} record 2)", f"{path} record 2 (in {path} record 1)"]
    assert got["sets"][0]["findings"][0]["where"] == where
    assert counts(got["sets"][0]["findings"]) == {"label revealed": 2, "duplicated": 1, "prompts differ": 2}


def test_a_given_away_label_is_named_with_where_it_is_read(tmp_path, file):
    path = file([*sound(2), *continued("worse")])
    _, got = report(tmp_path, path)
    revealed = got["sets"][0]["findings"][0]
    assert revealed["where"] == [f"{path} record 3 (in {path} record 4)"]
    assert "of 0 the better one, of 1 the worse" in revealed["about"]


def test_a_prompt_without_marks_is_a_human_turn(tmp_path, file):
    bare = [{"prompt": "What?", "chosen": answer, "rejected": "no"} for answer in ("yes", "well")]
    _, got = report(tmp_path, file([*bare, pair(["What?"], "maybe", "not"), pair(["What?", "yes", "so?"])]))
    assert got["sets"][0]["conversations"] == 1 and counts(got["sets"][0]["findings"]) == {"label revealed": 1}


def test_a_ranking_counts_by_its_best_and_worst_reply(tmp_path, file):
    def ranking(*scores):
        return {"prompt": dialogue(*prompt()) + "###Assistant: ", "responses": list("abc"), "scores": list(scores)}

    empty_best = ranking(1, 3, 2) | {"responses": ["a", "", "c"]}
    empty_middle = ranking(1, 2, 3) | {"responses": ["a", "", "c"]}
    _, got = report(tmp_path, file([ranking(1, 2, 3), ranking(1, 1, 1), empty_best, empty_middle]))
    assert counts(got["sets"][0]["findings"]) == {"no reply": 1}


# Between sets


def test_leaks_between_training_evaluation_and_sft_are_counted(tmp_path, file):
    asked = [prompt() for _ in range(7)]
    test = [pair(before) for before in asked]
    train = [
        *sound(5),
        pair(asked[0], "another", "and another"),  # only the conversation
        pair([*asked[1], "worse", *prompt()]),  # the label
        {"positive": test[2]["negative"], "negative": test[2]["positive"]},  # the pair, the other way round
    ]
    sft = [
        {"text": dialogue(*prompt(), "fine")},
        {"text": test[3]["positive"]},
        {"text": dialogue(*asked[4], "worse", *prompt(), "goes on")},
        {"text": dialogue(*asked[5], "neither")},
    ]
    argv = file(train), "--eval", file(test, "test.json"), "--sft", file(sft, "sft.json")
    status, got = report(tmp_path, *argv)
    assert status == 1 and got["held_out"] == 7
    assert counts(got["across"]) == {
        "pair in training": 1, "label in training": 1, "conversation in training": 3,
        "label in SFT": 2, "conversation in SFT": 3,
    }  # fmt: skip
    assert [counts(part["findings"]) for part in got["sets"]] == [{}, {}]
    assert {f["name"]: f["severity"] for f in got["across"] if "conv" in f["name"]}.popitem()[1] == "warning"
    assert report(tmp_path, *argv, "--fail_on", "never")[0] == 0


def test_the_recipes_own_split_leaks_where_a_split_by_conversation_does_not(tmp_path, file):
    opening = [prompt() for _ in range(20)]
    path = file([pair(before) for before in opening] + [pair([*before, "worse", *prompt()]) for before in opening])
    status, got = report(tmp_path, path, "--split", "25", "--split_by", "order")
    assert status == 0 and counts(got["across"]) == {"conversation in training": 10}
    # the last records are those that give away, so turn the file round
    path = file(json.loads(open(path).read())["instances"][::-1])
    status, got = report(tmp_path, path, "--split", "25", "--split_by", "order")
    assert status == 1 and counts(got["across"]) == {"label in training": 10, "conversation in training": 10}
    (label,) = [f for f in got["across"] if f["name"] == "label in training"]
    assert label["where"] == [f"{path} record {n} (in {path} record {n - 20})" for n in range(31, 36)]
    status, got = report(tmp_path, path, "--split", "25")
    assert status == 0 and counts(got["across"]) == {} and got["held_out"] == 10


# Lengths and subsets


def test_the_length_rule_is_told_by_subset(tmp_path, file):
    records = [pair(prompt(), "long", "l", subset="one"), pair(prompt(2), "l", "long", subset="one")]
    records += [pair(prompt(), "same", "size", subset="two"), *sound(1)]
    _, got = report(tmp_path, file(records))
    rows = {row.pop("subset"): row for row in got["sets"][0]["subsets"]}
    assert list(rows) == ["one", "two", "pairs.json", "(all)"]
    accuracy = {name: row["accuracy of the longer"] for name, row in rows.items()}
    assert accuracy == {"one": 0.5, "two": 0.5, "pairs.json": 1.0, "(all)": 0.625}
    assert rows["one"]["several human turns"] == 0.5 and rows["two"]["longer is better"] == 0


def test_with_a_tokenizer_lengths_are_tokens_and_what_a_cut_would_void_is_found(tmp_path, file):
    from rm.data.tokenizer import Tokenizer

    folder = byte_level(tmp_path / "model")
    long = "the cat sat on the mat " * 30
    records = [
        *sound(3),
        {"positive": long + "yes", "negative": long + "no"},  # void when cut on the right
        {"positive": "yes" + long, "negative": "no" + long},  # on the left
        {"positive": "yes" + long + "yes", "negative": "no" + long + "no"},
        {"positive": long + "yes" + long, "negative": long + "no" + long},  # on either
    ]
    _, got = report(tmp_path, file(records), "--tokenizer", folder, "--max_length", "100")
    found = counts(got["sets"][0]["findings"])
    assert {name: found[name] for name in ("cut right", "cut left")} == {"cut right": 2, "cut left": 2}
    (right,) = [f for f in got["sets"][0]["findings"] if f["name"] == "cut right"]
    assert right["where"][0].endswith("record 4")
    lengths = got["sets"][0]["lengths"]
    longest = 1 + max(len(Tokenizer(folder).encode(text)) for record in records for text in record.values())
    assert (lengths["unit"], lengths["q100"], lengths["longer"]) == ("tokens", longest, 4)
    assert sum(lengths["counts"]) == 7 and lengths["edges"][-1] >= longest > lengths["edges"][-2]


def test_dialogues_are_counted_as_training_writes_them(tmp_path, file):
    folder = byte_level(tmp_path / "model")
    asked = [{"role": "user", "content": "the cat?"}]
    messages = [{"prompt": asked, "chosen": "sat on the mat", "rejected": "the other"}]
    plain = [pair(["the cat?"], "sat on the mat", "the other")]
    flags = "--tokenizer", folder, "--dialogue_format", "hh"
    _, one = report(tmp_path, file(messages), *flags)
    _, other = report(tmp_path, file(plain), *flags)
    assert one["sets"][0]["lengths"] == other["sets"][0]["lengths"]
    with pytest.raises(ValueError, match="has messages, but .* no chat template"):
        report(tmp_path, file(messages), *flags[:2])


def test_sets_may_be_named_as_they_are_on_the_hub(tmp_path, file, monkeypatch):
    paths = {"hub:o/n/a.json": file(sound(3), "a.json"), "hub:o/n/b.json": file(sound(2), "b.json")}
    monkeypatch.setattr(__main__.hub, "data", paths.__getitem__)
    _, got = report(tmp_path, "hub:o/n/a.json", "--eval", "hub:o/n/b.json")
    assert [part["n"] for part in got["sets"]] == [3, 2]


# A slow twin

said = st.sampled_from(["a", "b", " a", ""])
texts = st.lists(said, min_size=2, max_size=5).map(lambda contents: dialogue("hi", *contents))


def slow_counts(pairs: list[dict]) -> dict[str, int]:
    def messages(text):
        return [tuple(map(str.strip, turn.split(":", 1))) for turn in text.split("###")[1:]]

    both = [[messages(pair["positive"]), messages(pair["negative"])] for pair in pairs]

    def goes_on(i, side):
        mine = both[i][side]
        others = (text for j, other in enumerate(both) if j != i for text in other)
        return mine[-1][0] == "Assistant" and any(len(t) > len(mine) and t[: len(mine)] == mine for t in others)

    n = range(len(both))
    found = {
        "label revealed": sum(goes_on(i, 0) != goes_on(i, 1) for i in n),
        "identical": sum(a == b for a, b in both),
        "swapped": sum(a != b and [b, a] in both for a, b in both),
        "duplicated": sum(both[i] in both[:i] for i in n),
        "prompts differ": sum(a[:-1] != b[:-1] for a, b in both),
        "no reply": sum(any(text[-1][0] == "Human" or not text[-1][1] for text in pair) for pair in both),
    }
    return {name: count for name, count in found.items() if count}


@settings(max_examples=150)
@given(made=st.lists(st.fixed_dictionaries({"positive": texts, "negative": texts}), min_size=1, max_size=8))
def test_counts_are_those_of_comparing_every_text_with_every_other(made, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "twin.json"
    path.write_text(json.dumps(made))
    args = __main__.parser().parse_args([str(path)])
    assert counts(__main__.audit(args)["sets"][0]["findings"]) == slow_counts(made)


# Bad input

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(records=st.lists(anything, max_size=4), flags=st.sampled_from([[], ["--split", "50"]]))
def test_any_json_gives_a_report_or_one_line(records, flags, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(records))
    try:
        assert __main__.shown(__main__.audit(__main__.parser().parse_args([str(path), *flags])))
    except ValueError as error:
        assert str(path) in str(error) or "--validation_split" in str(error)
        assert "\n" not in str(error)


BAD = {
    "no such file": (["missing.json"], "missing.json: no such file"),
    "sft with nothing held out": (["good.json", "--sft", "good.json"], "--sft is compared with pairs held out"),
    "two ways to hold out": (["good.json", "--eval", "good.json", "--split", "5"], "exclude each other"),
    "a length without a tokenizer": (["good.json", "--max_length", "5"], "--max_length counts tokens"),
    "no length": (["good.json", "--tokenizer", "model", "--max_length", "0"], "--max_length must be positive, got 0"),
    "texts": (["sft.json"], "sft.json record 1: has the keys 'text'"),
    "pairs as texts": (["good.json", "--split", "50", "--sft", "good.json"], "good.json record 1: has the keys"),
    "no preference": (["unranked.json"], "unranked.json record 1: has responses without 'ranks' or 'scores'"),
    "all held out": (["good.json", "--split", "100"], "must be 0 or more and leave some to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, file, tmp_path, monkeypatch):
    file(sound(4), "good.json"), file([{"text": "hi"}], "sft.json")
    file([{"prompt": "a", "responses": ["b", "c"]}], "unranked.json")
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[case]
    with pytest.raises(ValueError, match="(?s).*") as caught:
        __main__.main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_statuses_of_the_command(file, monkeypatch, capsys):
    def run(*argv) -> int:
        monkeypatch.setattr(sys, "argv", ["audit", *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(__main__.__file__, run_name="__main__")
        return ended.value.code

    path = file(continued("better"))
    assert (run(path), run(path, "--fail_on", "warning"), run("missing.json"), run()) == (0, 1, 2, 2)
    assert capsys.readouterr().err.startswith("error: missing.json: no such file")
