"""Examples of every format: one end, loss where it belongs, the same tokens however a pair is written down."""

import json

import numpy as np
import pytest

from rm.data import chat, dataset
from rm.data.encode import common_prefix
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of
from tests.text_fixtures import byte_level, llama_like, sentencepiece_model

MAKERS = {"byte-level": byte_level, "llama-like": llama_like, "sentencepiece": sentencepiece_model}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HEAD = [user("hi"), assistant("hello"), user("what eats the cat?")]
CHOSEN, REJECTED = [*HEAD, assistant("the dog")], [*HEAD, assistant("the mat")]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer(MAKERS[request.param](tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tokenizer(byte_level(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


@pytest.fixture
def encode(tmp_path):
    """Examples and report of records; `own`: the tokenizer's own template is at hand, as in the scripts."""

    def run(read, tokenizer, records, max_length=512, form=None, cut=None):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read([path], tokenizer, max_length, chat.choose(None, form, tokenizer), cut)

    return run


def full(tokenizer, text):
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text), tokenizer.eos_id]


def rows(example):
    return [[*example.prefix.tolist(), *reply.tolist()] for reply in example.replies]


def learned(example):
    """The tokens of a text that carry loss."""
    return example.replies[0][example.loss[0]].tolist()


# Preferences

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what eats the cat?\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": HH + " the dog", "rejected": HH + " the mat"},
        {"prompt": HH, "chosen": " the dog", "rejected": " the mat"},
        {"chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": HEAD, "chosen": "the dog", "rejected": "the mat"},
        {"prompt": HEAD, "responses": ["the dog", "the mat"], "scores": [1, 0]},
    ],
)
def test_a_pair_becomes_the_same_tokens_whatever_its_format(record, tokenizer, encode):
    (pair,), _ = encode(dataset.pairs, tokenizer, [record], form="hh")
    start = "###Human: hi###Assistant: hello###Human: what eats the cat?###Assistant: the "
    assert rows(pair) == [full(tokenizer, start + word) for word in ("dog", "mat")]
    assert pair.grade.tolist() == [1, 0] and pair.replies[0][0] != pair.replies[1][0]


def test_plain_texts_stay_plain_where_the_model_has_a_template_that_nobody_asked_for(qwen, encode):
    (pair,), _ = encode(dataset.pairs, qwen, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert rows(pair) == [full(qwen, "ab"), full(qwen, "ac")]


def test_messages_are_written_by_the_models_own_template_and_end_once(qwen, encode):
    (pair,), report = encode(dataset.pairs, qwen, [{"chosen": CHOSEN, "rejected": REJECTED}])
    for row in rows(pair):
        assert row.count(qwen.eos_id) == 5 and row[-1] == qwen.eos_id  # a system message and four turns
    assert str(report) == "1 records of chosen/rejected: all kept"


def test_a_ranking_keeps_its_order_and_grades_and_shares_what_all_replies_share(plain, encode):
    answers = ["the dog", "the mat", "the dogs", "no", "the dog"]
    (one,), _ = encode(dataset.pairs, plain, [{"prompt": "a ", "responses": answers, "ranks": [2, 1, 3, 3, 2]}])
    assert rows(one) == [full(plain, "a " + answer) for answer in answers]
    assert one.grade.tolist() == [-2, -1, -3, -3, -2] and one.prefix.tolist() == plain.encode("a")


def test_label_and_margin_travel(plain, encode):
    (one, two), _ = encode(
        dataset.pairs,
        plain,
        [{"chosen": "a", "rejected": "b", "label": 0.5, "margin": 2}, {"chosen": "a", "rejected": "b"}],
    )
    assert [(e.label, e.margin) for e in (one, two)] == [(0.5, 2), (1, 0)]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"chosen": "same", "rejected": "same"}, "with two equal sides"),
        ({"prompt": "a", "responses": ["b", "b", "c"], "ranks": [1, 2, 3]}, "with two equal sides"),
        ({"chosen": HEAD, "rejected": CHOSEN}, "that do not end with a reply"),
        ({"chosen": "the cat " * 600, "rejected": "a"}, "longer than --max_length 512"),
    ],
)
def test_what_says_nothing_is_dropped_by_its_reason(record, reason, qwen, encode):
    good = {"chosen": "a", "rejected": "b"}
    examples, report = encode(dataset.pairs, qwen, [good, record, good])
    assert examples.record.tolist() == [0, 2] and report.dropped == {reason: 1}


def test_equal_replies_of_equal_grade_are_a_tie(plain, encode):
    (one,), _ = encode(dataset.pairs, plain, [{"prompt": "a", "responses": ["b", "b", "c"], "scores": [1, 1, 0]}])
    assert len(one.replies) == 3


# Demonstrations


def test_text2text_learns_its_output_and_the_end(tokenizer, encode):
    (one,), _ = encode(dataset.texts, tokenizer, [{"input": "what eats the cat? ", "output": "naïve 🙂 dogs"}])
    assert rows(one) == [full(tokenizer, "what eats the cat? naïve 🙂 dogs")]
    rest = learned(one)
    rows_of_both = [np.array(row) for row in (rows(one)[0], [*full(tokenizer, "what eats the cat? "), -1])]
    assert rest == rows(one)[0][common_prefix(rows_of_both) :] and rest[-1] == tokenizer.eos_id


@pytest.mark.parametrize("form", [None, "hh"])
def test_a_dialogue_learns_every_reply_and_its_end(form, qwen, encode):
    messages = [*CHOSEN, user("thanks")]  # after the last reply there is nothing to learn
    (one,), _ = encode(dataset.texts, qwen, [{"messages": messages}], form=form)
    text = qwen._model.model.decode(learned(one), skip_special_tokens=False)
    assert text == ("hello<|im_end|>the dog<|im_end|>" if form is None else "hello the dog<|im_end|>")
    assert "thanks" not in qwen._model.model.decode(rows(one)[0])


def test_text2text_is_a_dialogue_where_a_template_is_asked_for(plain, encode):
    (one,), _ = encode(dataset.texts, plain, [{"input": "hi", "output": "hello"}], form="anthropic")
    assert rows(one) == [full(plain, "\n\nHuman: hi\n\nAssistant: hello")]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"input": "a", "output": ""}, "empty text"),
        ({"messages": [user("a"), assistant("")]}, "empty text"),
        ({"messages": [user("a")]}, "that do not end with a reply"),
    ],
)
def test_what_teaches_nothing_is_dropped(record, reason, qwen, encode):
    examples, report = encode(dataset.texts, qwen, [{"text": "a"}, record])
    assert len(examples) == 1 and report.dropped == {reason: 1}
    assert list(report.formats) == ["text_only", "conversation" if "messages" in record else "text2text"]


def test_messages_without_any_template_say_what_to_do(plain, encode):
    with pytest.raises(ValueError, match="line 1: has messages, but .* no chat template; give --chat_template or"):
        encode(dataset.texts, plain, [{"messages": CHOSEN}])


def test_a_template_that_refuses_names_the_record(plain, encode):
    with pytest.raises(ValueError, match="line 2: --dialogue_format hh refuses the dialogue: it has no place"):
        encode(
            dataset.texts, plain, [{"text": "a"}, {"messages": [{"role": "tool", "content": ""}, *CHOSEN]}], form="hh"
        )


# Shortening


def test_cut_on_the_left_pairs_still_share_their_prefix_and_keep_replies_and_end(tokenizer, encode):
    record = {"prompt": "one two three four five six seven ", "chosen": "the dog sat", "rejected": "a cat"}
    whole, _ = encode(dataset.pairs, tokenizer, [record])
    longest = int(whole.lengths[0] - min(map(len, whole[0].replies)))
    for max_length in range(longest, max(map(len, whole[0].replies)), -1):
        (pair,), report = encode(dataset.pairs, tokenizer, [record], max_length, cut="left")
        lost = longest - max_length
        bos = 0 if tokenizer.bos_id is None else 1
        assert rows(pair) == [[*row[:bos], *row[bos + lost :]] for row in rows(whole[0])]
        assert [r.tolist() for r in pair.replies] == [r.tolist() for r in whole[0].replies]
        assert report.shortened == (lost > 0)


def test_replies_that_do_not_fit_are_dropped_when_cutting_on_the_left(plain, encode):
    pairs = [{"prompt": "a", "chosen": "the dog sat on it", "rejected": "b"}, {"chosen": "a", "rejected": "b"}]
    examples, report = encode(dataset.pairs, plain, pairs, 4, cut="left")
    assert examples.record.tolist() == [1]
    assert str(report) == (
        "2 records of prompt/chosen/rejected (1) and chosen/rejected (1): 1 kept; dropped 1 that --max_length 4 would "
        "cut to nothing to learn from"
    )


def test_cut_on_the_right_a_pair_keeps_its_end_and_goes_when_its_difference_does(plain, encode):
    same = "the cat sat on the mat and "
    late, early = ({"chosen": a + same, "rejected": b + same} for a, b in ((same, same + "x"), ("a ", "b ")))
    examples, report = encode(dataset.pairs, plain, [early, late], 5, cut="right")
    assert examples.record.tolist() == [0] and report.shortened == 1
    assert rows(examples[0]) == [[*full(plain, early[key])[:4], plain.eos_id] for key in ("chosen", "rejected")]


@pytest.mark.parametrize("cut", ["left", "right"])
def test_a_shortened_text_keeps_its_end_token_and_does_not_learn_to_end_early(cut, plain, encode):
    record = {"text": "the cat sat on the mat and on the other mat"}
    row = full(plain, record["text"])
    (one,), _ = encode(dataset.texts, plain, [record], 6, cut=cut)
    assert rows(one) == ([row[-6:]] if cut == "left" else [[*row[:5], plain.eos_id]])
    assert one.loss[0].tolist() == [True] * 5 + [cut == "left"]


def test_a_text_whose_replies_are_cut_off_is_dropped(plain, encode):
    records = [{"input": "the cat sat on the mat", "output": "b"}, {"text": "a"}]
    _, report = encode(dataset.texts, plain, records, 4, cut="right")
    assert report.dropped == {"that --max_length 4 would cut to nothing to learn from": 1}


def test_no_row_is_ever_longer_than_asked(tokenizer, encode):
    draw = np.random.default_rng(0)
    words = lambda: " ".join(draw.choice(["the", "cat", "🙂", "mat"], draw.integers(1, 30)))  # noqa: E731
    records = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(200)]
    middle = int(np.median([max(map(len, rows(e))) for e in encode(dataset.pairs, tokenizer, records)[0]]))
    for cut in (None, "left", "right"):
        examples, report = encode(dataset.pairs, tokenizer, records, middle, cut=cut)
        assert max(len(row) for e in examples for row in rows(e)) == middle
        assert all(reply[-1] == tokenizer.eos_id for e in examples for reply in e.replies)
        assert report.kept + sum(report.dropped.values()) == 200 and (report.shortened > 0) == (cut is not None)
