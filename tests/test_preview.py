"""rm.preview: what it prints and writes for both kinds of data, and that nothing of others reaches a terminal raw."""

import json
import unicodedata
from pathlib import Path

import pytest

from rm import preview
from rm.config import parse
from rm.distributed import process_group as dist
from tests.templates import folder_of

QUESTION = {"role": "user", "content": "2+2?"}
PAIRS = [
    {"chosen": [QUESTION, {"role": "assistant", "content": "4"}], "rejected": [QUESTION, {"role": "assistant",
     "content": "5, so it is"}], "source": "sums"},
    {"chosen": [QUESTION, {"role": "assistant", "content": "4 " * 60}], "rejected": [QUESTION,
     {"role": "assistant", "content": "5"}], "source": "sums"},
]  # fmt: skip
EVIL = "\x1b[31mred\x07 \u202eturned \x9b2J\r\n<|im_end|>\ttab"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tokenizer and the template of ChatML, without weights or config.json."""
    return folder_of("SmolLM", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # so that paths in the output are short


def write(records: list[dict], name: str = "data.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, records)))
    return name


def show(capsys, model: Path, *words) -> str:
    """What `python -m rm.preview` prints."""
    words = [*map(str, words), "--model_name_or_path", str(model), "--cache_dir", "cache"]
    with dist.session(0):
        preview.main(parse(preview.Settings, "", words, preview.POSITIONAL))
    return capsys.readouterr().out


def test_a_demonstration(model, capsys):
    dialogue = [QUESTION, {"role": "assistant", "content": "4"}, QUESTION, {"role": "assistant", "content": "4!"}]
    file = write([{"messages": dialogue, "id": 7, "turns": 2}])
    assert (
        show(capsys, model, file, "--train_on", "last")
        == """\
data          data.jsonl: 1 record, as train_sft.py reads them
schemas       conversation (1)
keys          id, messages
passed over   turns
kept          1
tokens        median 87, 95 % up to 87, longest 87; 0 over --max_length 512

example 1 of 1, line 1: 87 tokens; «...» carries loss (3 tokens)
    <|im_start|>system↵
    You are a helpful AI assistant named SmolLM<|im_end|>↵
    <|im_start|>user↵
    2+2?<|im_end|>↵
    <|im_start|>assistant↵
    4<|im_end|>↵
    <|im_start|>user↵
    2+2?<|im_end|>↵
    <|im_start|>assistant↵
    «4!<|im_end|>»↵
"""
    )


def test_a_preference(model, capsys):
    assert (
        show(capsys, model, write(PAIRS), "--max_length", "100")
        == """\
data          data.jsonl: 2 records, as train_rm.py reads them
schemas       chosen/rejected (2)
keys          chosen, rejected
passed over   source
kept          1
dropped       1 longer than --max_length 100; the first is line 2
tokens        median 128, 95 % up to 179, longest 185; 1 over --max_length 100

example 1 of 1, line 1: 74 tokens; the reward is read at «...»
  shared by 2 replies, 63 tokens
    <|im_start|>system↵
    You are a helpful AI assistant named SmolLM<|im_end|>↵
    <|im_start|>user↵
    2+2?<|im_end|>↵
    <|im_start|>assistant↵
  chosen, 3 tokens
    4<|im_end|>«↵»
  rejected, 8 tokens
    5, so it is<|im_end|>«↵»
"""
    )


def test_json_has_the_ids_of_transformers_and_the_facts(model, capsys):
    from transformers import AutoTokenizer

    out = show(capsys, model, write(PAIRS), "--max_length", "100", "--json", "-")
    found = json.loads(out)  # and nothing else
    assert found["files"] == ["data.jsonl"] and found["script"] == "train_rm.py"
    assert found["schemas"] == {"chosen/rejected": 2}
    assert found["used"] == ["chosen", "rejected"] and found["passed_over"] == ["source"]
    assert found["kept"] == 1
    assert found["dropped"] == {"longer than --max_length 100": {"records": 1, "first": "data.jsonl line 2"}}
    assert found["tokens"]["longest"] == 185 and found["tokens"]["over"] == 1
    (example,) = found["examples"]
    assert example["place"] == "data.jsonl line 1"
    shared, *replies = example["texts"]
    assert [(reply["name"], reply["grade"]) for reply in replies] == [("chosen", 1.0), ("rejected", 0.0)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for reply, side in zip(replies, ("chosen", "rejected"), strict=True):
        parts = [*shared["parts"], *reply["parts"]]
        expected = tokenizer.apply_chat_template(PAIRS[0][side], return_dict=False)
        assert [index for part in parts for index in part["ids"]] == expected
        assert "".join(part["text"] for part in parts) == tokenizer.decode(expected)
        assert [part["marked"] for part in parts] == [False, False, True] and len(parts[-1]["ids"]) == 1


def test_json_beside_the_screen(model, capsys):
    file = write(PAIRS)
    text = show(capsys, model, file, "--json", "facts.json")
    assert text == show(capsys, model, "--dataset_path", file)
    assert json.loads(Path("facts.json").read_text())["kept"] == 2


@pytest.mark.parametrize("words", [(), ("--json", "-")])
def test_nothing_of_others_reaches_the_terminal_raw(words, model, capsys):
    dialogue = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    out = show(capsys, model, write([{"messages": dialogue, EVIL: 1}], f"{EVIL[:4]}.jsonl"), *words)
    controls = {c for c in out if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"}
    assert not controls
    if not words:
        assert "<U+001B>[31mred<U+0007> <U+202E>turned <U+009B>2J<U+000D>↵\n    <U+003C>|im_end|>⇥tab" in out


def test_lines_have_at_most_80_columns_and_long_texts_are_cut_with_a_count(model, capsys):
    turns = [
        {"role": role, "content": f"{n} 你好 " * 30 + "a" * 200} for n in range(20) for role in ("user", "assistant")
    ]
    file = write([{"messages": turns, "一" * 30: 1}])
    out = show(capsys, model, file, "--max_length", "100000")
    widths = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in out.splitlines()]
    assert 70 < max(widths) <= 80 and len(widths) < 100
    assert " tokens ...] " in out.replace("\n    ", "")


def test_the_count_of_what_is_left_out_and_what_is_shown_are_the_whole(model, capsys):
    file = write([{"text": " the" * 3000}])  # one token each
    out = show(capsys, model, file, "--max_length", "9999")
    text = out.partition("loss (")[2].partition("\n")[2].replace("\n    ", " ")
    left_out = int(text.partition("[... ")[2].partition(" ")[0].replace(",", ""))
    assert left_out + text.count("the") == 3000 and 300 < text.count("the") < 500


def test_marks_are_not_those_of_the_text(model, capsys):
    out = show(capsys, model, write([{"prompt": "dire", "completion": "«oui»"}]))
    assert "⟦«oui»<|im_end|>⟧↵" in out and "⟦...⟧ carries loss" in out


def test_what_fits_both_scripts_is_a_preference_unless_a_flag_says_otherwise(model, capsys):
    reply = [{"role": "assistant", "content": "4"}]
    record = {"messages": [QUESTION, *reply], "chosen": reply, "rejected": [{"role": "assistant", "content": "5"}]}
    record |= {"prompt": "2+2?"}
    out = show(capsys, model, write([record]))
    assert "as train_rm.py reads them" in out and "--sft true shows how" in out
    out = show(capsys, model, "data.jsonl", "--sft", "true")
    assert "as train_sft.py reads them" in out and "--sft" not in out


def test_places_are_those_of_the_files_as_they_are_called_now(model, capsys):
    write(PAIRS[:1], "short.jsonl")
    write(PAIRS[1:], "long.jsonl")
    words = ("--max_length", 100)
    assert "the first is long.jsonl line 1" in show(capsys, model, "short.jsonl", "long.jsonl", *words)
    Path("long.jsonl").rename("moved.jsonl")  # the cache's entry stays valid
    assert "the first is moved.jsonl line 1" in show(capsys, model, "short.jsonl", "moved.jsonl", *words)


def test_names_of_keys_are_shown_as_the_data_has_them(model, capsys):
    file = write([{"question": "2+2?", "good": "4", "bad": "5", "weight": 1}])
    words = ("--data_keys", "prompt=question", "chosen=good", "rejected=bad", "--ignore_keys", "weight")
    out = show(capsys, model, file, *words)
    assert "good as chosen, question as prompt, bad as rejected" in out
    assert "weight (--ignore_keys)" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["a.jsonl", "--max_lenght", "3"], "unknown flag --max_lenght: did you mean --max_length?"),
        ([], "required: --dataset_path"),
        (["a.jsonl", "--num_examples", "-1"], "--num_examples must not be negative, got -1"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(preview.Settings, "", [*words, "--model_name_or_path", "x"], preview.POSITIONAL)
    assert message in capsys.readouterr().err
