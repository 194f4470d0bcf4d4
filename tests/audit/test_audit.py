"""rm.audit: planted flaws are counted exactly, exit statuses, a slow reference implementation, bad input."""

import itertools
import json
import runpy
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.audit import __main__
from rm.audit.report import format_report, make_report
from tests.text_fixtures import byte_level

KEYS = ["positive", "negative", "chosen", "rejected", "prompt", "responses", "scores", "role", "content", "subset"]
COUNTER = itertools.count()


def dialogue(*contents: str, style: str = "###{}: {}") -> str:
    return "".join(style.format(("Human", "Assistant")[i % 2], content) for i, content in enumerate(contents))


def new_prompt(turns: int = 1) -> list[str]:
    """Contents of turns that are in no other dialogue; the last one is the human's."""
    return [f"turn {next(COUNTER)}" for _ in range(2 * turns - 1)]


def pair(prompt: list[str], better: str = "a better one", worse: str = "worse", **fields) -> dict:
    return {"positive": dialogue(*prompt, better), "negative": dialogue(*prompt, worse), **fields}


def sound(n: int) -> list[dict]:
    """Pairs without any flaw."""
    return [pair(new_prompt(turns=i % 3 + 1)) for i in range(n)]


@pytest.fixture
def file(tmp_path):
    def write(records, name="pairs.json") -> str:
        (tmp_path / name).write_text(json.dumps({"instances": records}))
        return str(tmp_path / name)

    return write


def report(tmp_path, *argv) -> tuple[int, dict]:
    """The exit status and the JSON report of the command."""
    status = __main__.main([*map(str, argv), "--json", str(tmp_path / "report.json")])
    return status, json.loads((tmp_path / "report.json").read_text())


def counts(findings: list[dict]) -> dict[str, int]:
    """Name -> count of the findings that concern any pair."""
    return {finding["name"]: finding["count"] for finding in findings if finding["count"]}


# Within one set


def test_sound_pairs_have_no_findings(tmp_path, file, capsys):
    status, got = report(tmp_path, file(sound(20)), "--fail_on", "warning", "--split", "20")
    assert status == 0 and not counts(got["sets"][0]["findings"]) and not counts(got["across"])
    assert (got["sets"][0]["n"], got["sets"][0]["conversations"], got["held_out"]) == (20, 20, 4)
    assert capsys.readouterr().out.endswith("checks with findings: 0 errors, 0 warnings\n")


def continued(side: str) -> list[dict]:
    """A pair, and one whose prompt continues the given side of it."""
    prompt = new_prompt()
    reply = {"better": "a better one", "worse": "worse"}[side]
    return [pair(prompt), pair([*prompt, reply, *new_prompt()])]


def twice(record: dict) -> list[dict]:
    return [record, dict(record)]


def swapped() -> list[dict]:
    record = pair(new_prompt())
    return [record, {"positive": record["negative"], "negative": record["positive"]}]


def both_continued() -> list[dict]:
    """No label is revealed: both replies are continued in another record."""
    prompt = new_prompt()
    return [pair(prompt), pair([*prompt, "a better one", *new_prompt()]), pair([*prompt, "worse", *new_prompt()])]


def one_side_continues_the_other() -> list[dict]:
    one = dialogue(*new_prompt(), "yes")
    return [{"positive": one, "negative": one + dialogue("more?", "no")}]


def anthropic_style() -> dict:
    sides = (dialogue("what?", " worse\n", "so", answer, style="\n\n{}: {}") for answer in "xy")
    return dict(zip(("chosen", "rejected"), sides, strict=True))


def with_messages() -> dict:
    contents = {"user": "why?", "assistant": "worse"}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    return {"prompt": [*messages, {"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}


FLAWS = {  # name of the finding, with "by ..." for a variant -> (how to plant it, number of pairs concerned)
    "label revealed": (lambda: [*continued("better"), *continued("better"), *continued("worse")], 3),
    "label revealed by another style": (lambda: [pair(["what?"]), anthropic_style()], 1),
    "label revealed by messages": (lambda: [pair(["why?"]), with_messages()], 1),
    "identical": (lambda: [pair(new_prompt(), "same", "same"), pair(new_prompt(), "same ", "same")], 2),
    "swapped": (lambda: [*swapped(), *swapped()], 4),
    "duplicated": (lambda: [*twice(pair(new_prompt())), *twice(pair(new_prompt())), *twice(pair(new_prompt())) * 2], 5),
    "prompts differ": (
        lambda: [{"positive": dialogue(*new_prompt(), "a"), "negative": dialogue(*new_prompt(), "b")}],
        1,
    ),
    "no reply": (lambda: [pair(new_prompt(), "", "b"), pair(new_prompt(), "a", " \n")], 2),
    "no turns": (lambda: [{"positive": "a text", "negative": "another"}], 1),
    "": (both_continued, 0),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_planted_flaw_is_counted_and_no_other_one(flaw, tmp_path, file, capsys):
    make, count = FLAWS[flaw]
    planted = make()
    records = sound(4) + planted[:1] + sound(3) + planted[1:]
    status, got = report(tmp_path, file(records), "--fail_on", "warning")
    name = flaw.partition(" by ")[0]
    assert counts(got["sets"][0]["findings"]) == ({name: count} if count else {})
    assert status == (1 if count else 0)
    (finding,) = [f for f in got["sets"][0]["findings"] if f["name"] == name] or [None]
    if finding:
        assert finding["share"] == count / len(records) and finding["severity"] == "warning"
        assert len(finding["where"]) == min(count, 5) and f"{name}: {count} (" in capsys.readouterr().out


def test_a_pair_whose_one_side_continues_the_other_does_not_leak_itself(tmp_path, file):
    _, got = report(tmp_path, file(one_side_continues_the_other()))
    assert counts(got["sets"][0]["findings"]) == {"prompts differ": 1}
    path = file(one_side_continues_the_other() * 2)  # but its duplicate does
    _, got = report(tmp_path, path)
    where = [f"{path} record 1 (in {path} record 2)", f"{path} record 2 (in {path} record 1)"]
    assert got["sets"][0]["findings"][0]["where"] == where
    assert counts(got["sets"][0]["findings"]) == {"label revealed": 2, "duplicated": 1, "prompts differ": 2}


def test_a_label_leak_names_the_pair_and_the_record_that_reveals_it(tmp_path, file):
    path = file([*sound(2), *continued("worse")])
    _, got = report(tmp_path, path)
    revealed = got["sets"][0]["findings"][0]
    assert revealed["where"] == [f"{path} record 3 (in {path} record 4)"]
    assert "the better reply of 0 pairs, the worse reply of 1" in revealed["about"]


def test_a_prompt_without_marks_is_a_human_turn(tmp_path, file):
    bare = [{"prompt": "What?", "chosen": answer, "rejected": "no"} for answer in ("yes", "well")]
    _, got = report(tmp_path, file([*bare, pair(["What?"], "maybe", "not"), pair(["What?", "yes", "so?"])]))
    assert got["sets"][0]["conversations"] == 1 and counts(got["sets"][0]["findings"]) == {"label revealed": 1}


def test_a_ranking_counts_by_its_best_and_worst_reply(tmp_path, file):
    def ranking(*scores):
        return {"prompt": dialogue(*new_prompt()) + "###Assistant: ", "responses": list("abc"), "scores": list(scores)}

    empty_best = ranking(1, 3, 2) | {"responses": ["a", "", "c"]}
    empty_middle = ranking(1, 2, 3) | {"responses": ["a", "", "c"]}
    _, got = report(tmp_path, file([ranking(1, 2, 3), ranking(1, 1, 1), empty_best, empty_middle]))
    assert counts(got["sets"][0]["findings"]) == {"no reply": 1}


# Between sets


def test_leaks_between_training_evaluation_and_sft_are_counted(tmp_path, file):
    prompts = [new_prompt() for _ in range(7)]
    test = [pair(prompt) for prompt in prompts]
    train = [
        *sound(5),
        pair(prompts[0], "another", "and another"),  # only the conversation
        pair([*prompts[1], "worse", *new_prompt()]),  # the label
        {"positive": test[2]["negative"], "negative": test[2]["positive"]},  # the pair, swapped
    ]
    sft = [
        {"text": dialogue(*new_prompt(), "fine")},
        {"text": test[3]["positive"]},
        {"text": dialogue(*prompts[4], "worse", *new_prompt(), "goes on")},
        {"text": dialogue(*prompts[5], "neither")},
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


def test_a_split_by_order_leaks_where_one_by_conversation_does_not(tmp_path, file):
    prompts = [new_prompt() for _ in range(20)]
    continuations = [pair([*prompt, "worse", *new_prompt()]) for prompt in prompts]
    path = file([pair(prompt) for prompt in prompts] + continuations)
    status, got = report(tmp_path, path, "--split", "25", "--split_by", "order")
    assert status == 0 and counts(got["across"]) == {"conversation in training": 10}
    # Above, held-out records (the last ones) reveal labels of training records; reversed, it is the other way round.
    path = file(json.loads(open(path).read())["instances"][::-1])
    status, got = report(tmp_path, path, "--split", "25", "--split_by", "order")
    assert status == 1 and counts(got["across"]) == {"label in training": 10, "conversation in training": 10}
    (label,) = [f for f in got["across"] if f["name"] == "label in training"]
    assert label["where"] == [f"{path} record {n} (in {path} record {n - 20})" for n in range(31, 36)]
    status, got = report(tmp_path, path, "--split", "25")
    assert status == 0 and counts(got["across"]) == {} and got["held_out"] == 10


# Lengths and subsets


def test_a_label_says_which_side_is_better(tmp_path, file, capsys):
    short, long = "l", "longer"
    prompts = [dialogue(*new_prompt()) + "###Assistant: " for _ in range(3)]
    pairs = [{"prompt": prompts[0], "chosen": short, "rejected": long, "label": 0, "author": "x"}]
    pairs += [{"prompt": prompts[0], "chosen": long, "rejected": short, "label": 1.0}]  # says the same
    pairs += [{"prompt": prompts[1], "chosen": short, "rejected": long, "label": 0.5}]
    pairs += [{"prompt": prompts[2], "response_a": short, "response_b": long, "winner": "b"}]
    _, got = report(tmp_path, file(pairs))
    (row,) = got["sets"][0]["subsets"]
    assert row["longer is better"] == 0.75 and row["accuracy of the longer"] == 0.875
    assert counts(got["sets"][0]["findings"]) == {"duplicated": 1}
    assert got["sets"][0]["schemas"] == {"prompt/chosen/rejected": 3, "prompt/response_a/response_b/winner": 1}
    assert "keys passed over: author" in capsys.readouterr().out


def test_keys_are_named_and_passed_over_as_in_training(tmp_path, file):
    path = file([{"text": "q", "yes": "a", "no": "bb", "history": [["c", "d"]]}])
    names = ("--data_keys", "prompt=text", "chosen=yes", "rejected=no", "--ignore_keys", "history")
    assert report(tmp_path, path, *names)[1]["sets"][0]["n"] == 1


def test_length_statistics_are_reported_by_subset(tmp_path, file):
    records = [pair(new_prompt(), "long", "l", subset="one"), pair(new_prompt(2), "l", "long", subset="one")]
    records += [pair(new_prompt(), "same", "size", subset="two"), *sound(1)]
    _, got = report(tmp_path, file(records))
    rows = {row.pop("subset"): row for row in got["sets"][0]["subsets"]}
    assert list(rows) == ["one", "two", "pairs.json", "(all)"]
    accuracy = {name: row["accuracy of the longer"] for name, row in rows.items()}
    assert accuracy == {"one": 0.5, "two": 0.5, "pairs.json": 1.0, "(all)": 0.625}
    assert rows["one"]["several human turns"] == 0.5 and rows["two"]["longer is better"] == 0


def test_a_tokenizer_gives_lengths_in_tokens_and_finds_harmful_truncation(tmp_path, file):
    from rm.data.tokenizer import Tokenizer

    folder = byte_level(tmp_path / "model")
    long = "the cat sat on the mat " * 30
    records = [
        *sound(3),
        {"positive": long + "yes", "negative": long + "no"},  # identical when truncated on the right
        {"positive": "yes" + long, "negative": "no" + long},  # when truncated on the left
        {"positive": "yes" + long + "yes", "negative": "no" + long + "no"},
        {"positive": long + "yes" + long, "negative": long + "no" + long},  # on either side
    ]
    _, got = report(tmp_path, file(records), "--tokenizer", folder, "--max_length", "100")
    count = counts(got["sets"][0]["findings"])
    assert {name: count[name] for name in ("cut right", "cut left")} == {"cut right": 2, "cut left": 2}
    (right,) = [f for f in got["sets"][0]["findings"] if f["name"] == "cut right"]
    assert right["where"][0].endswith("record 4")
    lengths = got["sets"][0]["lengths"]
    longest = 1 + max(len(Tokenizer(folder).encode(text)) for record in records for text in record.values())
    assert (lengths["unit"], lengths["q100"], lengths["longer"]) == ("tokens", longest, 4)
    assert sum(lengths["counts"]) == 7 and lengths["edges"][-1] >= longest > lengths["edges"][-2]


def test_token_lengths_use_the_dialogue_format_of_training(tmp_path, file):
    folder = byte_level(tmp_path / "model")
    question = [{"role": "user", "content": "the cat?"}]
    messages = [{"prompt": question, "chosen": "sat on the mat", "rejected": "the other"}]
    plain = [pair(["the cat?"], "sat on the mat", "the other")]
    flags = "--tokenizer", folder, "--dialogue_format", "hh"
    _, one = report(tmp_path, file(messages), *flags)
    _, other = report(tmp_path, file(plain), *flags)
    assert one["sets"][0]["lengths"] == other["sets"][0]["lengths"]
    with pytest.raises(ValueError, match="has messages, but .* no chat template"):
        report(tmp_path, file(messages), *flags[:2])


def test_files_may_be_names_on_the_hub(tmp_path, file, monkeypatch):
    paths = {"hub:o/n/a.json": [file(sound(3), "a.json")], "hub:o/n/b.json": [file(sound(2), "b.json")]}
    monkeypatch.setattr(__main__.hub, "data", paths.__getitem__)
    _, got = report(tmp_path, "hub:o/n/a.json", "--eval", "hub:o/n/b.json")
    assert [part["n"] for part in got["sets"]] == [3, 2]


# A slow reference implementation

contents = st.sampled_from(["a", "b", " a", ""])
texts = st.lists(contents, min_size=2, max_size=5).map(lambda drawn: dialogue("hi", *drawn))


def slow_counts(pairs: list[dict]) -> dict[str, int]:
    def messages(text):
        return [tuple(map(str.strip, turn.split(":", 1))) for turn in text.split("###")[1:]]

    sides = [[messages(pair["positive"]), messages(pair["negative"])] for pair in pairs]

    def is_continued(i, side):
        text = sides[i][side]
        others = [other for j, both in enumerate(sides) if j != i for other in both]
        continued = any(len(other) > len(text) and other[: len(text)] == text for other in others)
        return text[-1][0] == "Assistant" and continued

    indices = range(len(sides))
    count = {
        "label revealed": sum(is_continued(i, 0) != is_continued(i, 1) for i in indices),
        "identical": sum(a == b for a, b in sides),
        "swapped": sum(a != b and [b, a] in sides for a, b in sides),
        "duplicated": sum(sides[i] in sides[:i] for i in indices),
        "prompts differ": sum(a[:-1] != b[:-1] for a, b in sides),
        "no reply": sum(any(text[-1][0] == "Human" or not text[-1][1] for text in both) for both in sides),
    }
    return {name: n for name, n in count.items() if n}


@settings(max_examples=150)
@given(records=st.lists(st.fixed_dictionaries({"positive": texts, "negative": texts}), min_size=1, max_size=8))
def test_counts_equal_those_of_comparing_all_texts_with_each_other(records, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "pairs.json"
    path.write_text(json.dumps(records))
    args = __main__.parser().parse_args([str(path)])
    assert counts(make_report(args)["sets"][0]["findings"]) == slow_counts(records)


# Bad input

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(records=st.lists(anything, max_size=4), flags=st.sampled_from([[], ["--split", "50"]]))
def test_any_json_gives_a_report_or_a_one_line_error(records, flags, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(records))
    try:
        assert format_report(make_report(__main__.parser().parse_args([str(path), *flags])))
    except ValueError as error:
        assert str(path) in str(error) or "--validation_split" in str(error)
        assert "\n" not in str(error)


BAD = {  # case -> (arguments, part of the error message)
    "no such file": (["missing.json"], "missing.json: no such file"),
    "sft with nothing held out": (["good.json", "--sft", "good.json"], "--sft is compared with held-out pairs"),
    "two ways to hold out": (["good.json", "--eval", "good.json", "--split", "5"], "exclude each other"),
    "a length without a tokenizer": (["good.json", "--max_length", "5"], "--max_length counts tokens"),
    "no length": (["good.json", "--tokenizer", "model", "--max_length", "0"], "--max_length must be positive, got 0"),
    "texts": (["sft.json"], "sft.json record 1: has the keys 'text'"),
    "pairs as texts": (["good.json", "--split", "50", "--sft", "good.json"], "good.json record 1: has the keys"),
    "no preference": (["unranked.json"], "unranked.json record 1: has responses without 'ranks' or 'scores'"),
    "all held out": (["good.json", "--split", "100"], "must be 0 or more and leave some to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_a_one_line_error(case, file, tmp_path, monkeypatch):
    file(sound(4), "good.json"), file([{"text": "hi"}], "sft.json")
    file([{"prompt": "a", "responses": ["b", "c"]}], "unranked.json")
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[case]
    with pytest.raises(ValueError, match="(?s).*") as caught:
        __main__.main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_exit_statuses_of_the_command(file, monkeypatch, capsys):
    def run(*argv) -> int:
        monkeypatch.setattr(sys, "argv", ["audit", *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(__main__.__file__, run_name="__main__")
        return ended.value.code

    path = file(continued("better"))
    assert (run(path), run(path, "--fail_on", "warning"), run("missing.json"), run()) == (0, 1, 2, 2)
    assert capsys.readouterr().err.startswith("error: missing.json: no such file")
