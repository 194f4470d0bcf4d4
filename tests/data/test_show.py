"""rm.data.show: the example before a training's first step, colours, and texts decoded from any of their tokens."""

import io

import numpy as np
import pytest

from rm.data import dataset, show
from rm.data.encode import Task
from rm.data.examples import Example, Examples
from rm.data.show import BRIEF, FULL, Screen
from rm.data.tokenizer import Tokenizer
from tests import text_fixtures
from tests.templates import folder_of

TEXT = "the café: 你好\n\n\tcat"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(folder_of("SmolLM", tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def ranking(tokenizer: Tokenizer, replies: int, length: int, **facts) -> Example:
    prompt, reply = (np.array(tokenizer.encode(text * length), np.int32) for text in (" the", " cat"))
    grade = np.arange(replies, dtype=np.float32)[::-1] + 1
    loss = (np.ones(len(reply), bool),) * replies
    return Example(prefix=prompt, replies=(reply,) * replies, loss=loss, grade=grade, **facts)


@pytest.mark.parametrize("make", ["byte_level", "llama_like", "metaspace", "sentencepiece_model"])
def test_a_text_is_decoded_from_its_tokens_in_any_two_runs(make, tmp_path):
    tokenizer = Tokenizer(getattr(text_fixtures, make)(tmp_path))
    text = TEXT if make in ("byte_level", "sentencepiece_model") else "the cat: at"
    ids = tokenizer.encode(text)
    whole = [(text, False)] if make == "byte_level" else [(f" {text}", False)]  # the others begin with a blank token
    assert tokenizer.decode(ids) == whole
    for n in range(1, len(ids)):
        runs = [piece for run in (ids[:n], ids[n:]) for piece, _ in tokenizer.decode(run)]
        if not any("\ufffd" in run for run in runs):  # within a character
            assert "".join(runs) == whole[0][0]


def test_special_tokens_are_told_from_the_same_strings_in_texts(tokenizer):
    end = tokenizer.special["<|im_end|>"]
    ids = np.array([*tokenizer.encode("a<|im_end|>"), end, end])
    expected = [("a<U+003C>|im_end|>", False), ("<|im_end|>", True), ("<|im_end|>", True)]
    assert show.decoded(ids, tokenizer) == expected


@pytest.mark.parametrize("replies", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 5000])
def test_the_example_of_a_training_takes_about_12_lines_of_80_columns(replies, length, tokenizer, capsys):
    show.say_example(Examples.build([ranking(tokenizer, replies, length)], [41]), tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("example (record 42 of the data): ")
    assert len(lines) <= 14 and max(map(len, lines)) <= 80
    assert replies < 3 or lines[-1] == "  and 3 more replies"


@pytest.mark.parametrize(
    "grades, label, names",
    [
        ([1, 0], 1.0, ["chosen", "rejected"]),
        ([0, 1], 1.0, ["rejected", "chosen"]),
        ([1, 0], 0.3, ["rejected", "chosen"]),
        ([1, 0], 0.5, ["tied", "tied"]),
        ([2.5, 1], 1.0, ["grade 2.5", "grade 1"]),
        ([1, 0, 0], 1.0, ["grade 1", "grade 0", "grade 0"]),
    ],
)
def test_names_of_replies(grades, label, names):
    one = np.ones(1, np.int32)
    loss = (np.ones(1, bool),) * len(grades)
    example = Example(one, (one,) * len(grades), loss, np.array(grades, np.float32), label)
    assert [text.name for text in show.texts_of(example)] == ["shared", *names]


def test_the_first_token_of_a_text_carries_no_loss(tokenizer):
    """As transformers, which shifts the labels by one: nothing predicts it."""
    ids = np.array(tokenizer.encode("the cat"), np.int32)
    (text,) = show.texts_of(Example(ids[:0], (ids,), (np.ones(len(ids), bool),)))
    assert [(len(part), marked) for part, marked in text.parts] == [(1, False), (len(ids) - 1, True)]


def test_colours_are_for_terminals_that_have_them(tokenizer, monkeypatch):
    example = ranking(tokenizer, 2, 3)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = Screen(Terminal()).example(example, tokenizer, "example", BRIEF)
    assert any("\x1b[32m" in line for line in lines)
    plain = Screen(io.StringIO()).example(example, tokenizer, "example", BRIEF)
    assert not any("\x1b" in line for line in plain) and any("«" in line for line in plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(Terminal()).example(example, tokenizer, "example", BRIEF) == plain


def test_a_stream_that_cannot_write_the_signs_gets_their_codes(tokenizer):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for line in Screen(stream).example(ranking(tokenizer, 2, 3), tokenizer, "example", FULL):
        stream.write(line)
    stream.flush()


def test_lengths_are_of_all_records_and_estimated_for_texts_far_too_long(tokenizer, tmp_path):
    """A text far over --max_length is not tokenized whole; its length is known to about a tenth."""
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f'{{"text": "{" the cat" * n}"}}' for n in (2, 10, 40, 4000)))
    _, report = dataset.read(Task.SFT, [file], tokenizer, max_length=50)
    whole, _ = dataset.read(Task.SFT, [file], tokenizer, max_length=100_000)
    longest = int(whole.lengths.max())
    assert report.lengths["estimated"] == 1 and report.lengths["over"] == 2
    assert report.lengths["longest"] == pytest.approx(longest, rel=0.1)
    assert report.lengths["median"] == int(np.median(whole.lengths))
    assert report.first_dropped == {"longer than --max_length 50": (0, "line 3")}
