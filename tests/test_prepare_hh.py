"""rm.prepare_hh: the recipe's exact JSON, each conversation in one file, sizes, reproducibility, what is left out."""

import itertools
import json
import random

import pytest

from rm import prepare_hh
from rm.data.conversation import key
from rm.data.sample import turns

PROMPT = "\n\nHuman: Are space heaters safe?\n\nAssistant: What?  Can’t you say?\n\nHuman: Fire\n\nAssistant:"
ANTHROPIC = {"chosen": PROMPT + " Yes.", "rejected": PROMPT + " No"}
DAHOAS = {"prompt": PROMPT, "response": " Yes.", "chosen": " Yes.", "rejected": " No"}
BEFORE = "###Human: Are space heaters safe?###Assistant: What?  Can’t you say?###Human: Fire###Assistant: "


def make_records(conversations: int, seed: int = 0) -> list[dict]:
    """Shuffled records of conversations; each conversation has one to three records, each continues the one before."""
    rng, records = random.Random(seed), []
    for number in range(conversations):
        text = ""
        for turn in range(rng.randint(1, 3)):
            text += f"\n\nHuman: question {number} {turn}\n\nAssistant:"
            records.append({"chosen": f"{text} good {turn}", "rejected": f"{text} bad {turn}"})
            text += f" good {turn}"
    rng.shuffle(records)
    return records


@pytest.fixture
def prepare(tmp_path):
    def run(records, *argv, out="out") -> dict[str, dict]:
        (tmp_path / "hh.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prepare_hh.main([str(tmp_path / "hh.jsonl"), "--output_dir", str(tmp_path / out), *map(str, argv)])
        return {file.stem: json.loads(file.read_text()) for file in (tmp_path / out).iterdir()}

    return run


def texts(document: dict) -> list[str]:
    return [next(iter(instance.values())) for instance in document["instances"]]


@pytest.mark.parametrize("record", [ANTHROPIC, DAHOAS])
def test_files_have_the_recipes_json_format(record, prepare, tmp_path):
    files = prepare([record], "--sft", 1, "--rm", 0)
    assert files == {"sft": {"type": "text_only", "instances": [{"text": BEFORE + "Yes."}]}}
    assert "Can’t" in (tmp_path / "out" / "sft.json").read_text(encoding="utf-8")  # readable, not escaped
    files = prepare([record], "--sft", 0, "--rm", 1, "--test", 0, out="rm")
    assert files == {"rm": {"instances": [{"positive": BEFORE + "Yes.", "negative": BEFORE + "No"}]}}
    assert prepare([record], "--sft", 0, "--rm", 0, "--test", "all", out="test") == {"test": files["rm"]}


def test_a_conversation_is_in_one_file_only_and_contiguous_there(prepare):
    records = make_records(200)
    files = prepare(records, "--sft", 100, "--rm", 120, "--test", 50)
    assert [len(files[name]["instances"]) for name in ("sft", "rm", "test")] == [100, 120, 50]
    conversations = [[key(turns(text)) for text in texts(files[name])] for name in ("sft", "rm", "test")]
    for one, other in itertools.combinations(conversations, 2):
        assert not set(one) & set(other)
    for keys in conversations:
        changes = 1 + sum(a != b for a, b in zip(keys, keys[1:], strict=False))
        assert changes == len(set(keys))
    written = {json.dumps(pair) for name in ("rm", "test") for pair in files[name]["instances"]}
    expected = {
        json.dumps({"positive": lmflow_format(record["chosen"]), "negative": lmflow_format(record["rejected"])})
        for record in records
    }
    assert written < expected and len(written) == 170


def lmflow_format(text: str) -> str:
    """The conversion that the recipe's authors used."""
    return text.replace("\n\nHuman", "###Human").replace("\n\nAssistant", "###Assistant")


def test_all_takes_what_the_other_files_leave(prepare):
    records = make_records(60)
    files = prepare(records, "--sft", "all", "--rm", 30, "--test", 20)
    written = sum(len(document["instances"]) for document in files.values())
    assert len(files["rm"]["instances"]) == 30 and len(files["test"]["instances"]) == 20
    assert len(records) - 4 <= written <= len(records)  # two conversations may have been cut short


def test_files_depend_on_the_seed_only(prepare):
    argv = "--sft", 20, "--rm", 20
    one, same = (prepare(make_records(60), *argv, out=out) for out in ("one", "same"))
    other = prepare(make_records(60), *argv, "--seed", 1, out="other")
    assert one == same and one["rm"] != other["rm"]


def test_input_files_may_be_names_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(make_records(5)))
    monkeypatch.setattr(prepare_hh.hub, "data", {"hub:o/n/a.json": [tmp_path / "a.json"]}.__getitem__)
    prepare_hh.main(["hub:o/n/a.json", "--output_dir", str(tmp_path), "--sft", "2", "--rm", "0"])
    assert len(json.loads((tmp_path / "sft.json").read_text())["instances"]) == 2


LEFT_OUT = {  # reason -> (messages of the chosen side, messages of the rejected side)
    "identical sides": (["a", "b"], ["a", "b "]),
    "blank reply": (["a", ""], ["a", "b"]),
    "different prompts": (["a", "b"], ["c", "b"]),
    "turns are not Human, Assistant, Human, ...": (["a", "b", "c"], ["a", "b"]),
    "turn mark inside a message": (["a###Human: b", "b"], ["a###Human: b", "c"]),
    "repeated pair": (["q 0", "yes"], ["q 0", "no"]),
}


THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "two and two"}
NO_PLACE = {
    "tools, which have no place": {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
    "thoughts or calls, which have no place": {"prompt": "q", "chosen": [THOUGHT], "rejected": "a"},
}


@pytest.mark.parametrize("reason", NO_PLACE)
def test_what_plain_text_has_no_place_for_is_left_out_and_counted(reason, prepare, capsys):
    files = prepare([NO_PLACE[reason], record(["q", "yes"], ["q", "no"])], "--sft", 0, "--rm", "all")
    assert len(files["rm"]["instances"]) == 1 and f"left out: 1 ({reason})" in capsys.readouterr().out


def record(chosen: list[str], rejected: list[str]) -> dict:
    def dialogue(contents):
        return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {content}" for i, content in enumerate(contents))

    return {"chosen": dialogue(chosen), "rejected": dialogue(rejected)}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_unusable_pairs_are_left_out_and_counted(reason, prepare, capsys):
    usable = record(["q 0", "yes"], ["q 0", "no"]), record(["q 1", "yes"], ["q 1", "no"])
    unusable = record(*LEFT_OUT[reason])
    files = prepare([usable[0], unusable, usable[1], unusable], "--sft", 0, "--rm", "all")
    assert len(files["rm"]["instances"]) == 2
    out = capsys.readouterr().out
    assert f"left out: 2 ({reason})" in out and out.count("left out") == 1 and "2 usable pairs of 2 conv" in out


def test_existing_files_are_not_overwritten(prepare, tmp_path):
    files = prepare(make_records(9), "--sft", 2, "--rm", 2)
    with pytest.raises(ValueError, match="rm.json exists already: choose another --output_dir"):
        prepare(make_records(9), "--sft", 0, "--rm", 1)
    assert json.loads((tmp_path / "out" / "rm.json").read_text()) == files["rm"]


BAD = {
    "too many": (["--sft", 9, "--rm", 12], "1 usable pairs of 1 conversations are too few for --sft 9, --rm 12"),
    "two of all": (["--sft", "all", "--rm", "all"], "too few for --sft all, --rm all"),
    "none": (["--sft", 0, "--rm", 0], "are all 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_sizes_raise_one_line_and_write_nothing(case, prepare, tmp_path):
    argv, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        prepare([ANTHROPIC], *argv)
    assert not list(tmp_path.glob("out/*"))


def test_a_record_that_is_not_a_preference_is_named(prepare):
    with pytest.raises(ValueError, match="hh.jsonl line 2: has the keys 'text'"):
        prepare([ANTHROPIC, {"text": "hi"}], "--sft", 1)


def test_a_label_says_which_side_is_better_and_a_tie_is_left_out(prepare, capsys):
    def record(label, n):
        return {"prompt": f"\n\nHuman: {n}?\n\nAssistant:", "chosen": " bad", "rejected": " good", "label": label}

    records = [record(0.0, 1), record(0.2, 2), record(1.0, 3), record(0.5, 4)]
    files = prepare(records, "--sft", 1, "--rm", 2)
    pairs = files["rm"]["instances"]
    assert {pair["positive"].split()[-1] for pair in pairs if "3?" not in pair["positive"]} == {"good"}
    assert "left out: 1 (neither reply is better)" in capsys.readouterr().out
