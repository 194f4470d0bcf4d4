"""rm.data.dataset, records and examples: every file layout gives the same examples; dropped records; bad files."""

import csv
import functools
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm.data import chat, dataset, encode, records
from rm.data.dataset import DataSettings, MixtureSettings, TextSettings
from rm.data.encode import Task
from rm.data.examples import Example, Examples
from rm.data.reader import KeySettings, SampleReader
from rm.data.schemas import SFT
from rm.data.sets import UNNAMED
from rm.data.split import SplitSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from tests.templates import folder_of
from tests.text_fixtures import byte_level, llama_like, sentencepiece_model

TEXTS = [{"text": "the cat sat"}, {"text": "naïve 🙂\nlines", "extra": 1}, {"text": " the capital of France"}]
PAIRS = [
    {"positive": "Human: hi\n\nAssistant: hello there", "negative": "Human: hi\n\nAssistant: what"},
    {"positive": "a", "negative": "b", "extra": None},
    {"positive": "same", "negative": "same but longer"},
    {"positive": "", "negative": "long and longer"},
]
MAKERS = {"byte-level": byte_level, "llama-like": llama_like, "sentencepiece": sentencepiece_model}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer(MAKERS[request.param](tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One tokenizer, for tests where the kind does not matter."""
    return Tokenizer(byte_level(tmp_path_factory.mktemp("plain")))


def lines(records, end="\n"):
    return end.join(json.dumps(record) for record in records) + end


def document(records, **settings):
    return {**settings, "instances": records}


LAYOUTS = {  # name -> function that writes records
    "json lines": lines,
    "json lines of Windows, with blank lines": lambda records: "\ufeff\r\n" + lines(records, "\r\n\r\n"),
    "json lines without a last line end": lambda records: lines(records).rstrip(),
    "document": lambda records: json.dumps(document(records)),
    "document with its type last": lambda records: json.dumps(document(records) | {"type": "text_only"}),
    "document over many lines": lambda records: "\n" + json.dumps(document(records), indent=2) + "\n\n",
    "document with raw characters": lambda records: json.dumps(document(records), ensure_ascii=False, indent=0),
    "list": json.dumps,
    "list over many lines": lambda records: json.dumps(records, indent=1),
}


@pytest.fixture
def file(tmp_path):
    def write(content, name="data.json") -> Path:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def example(prefix, *replies):
    replies = tuple(np.array(reply, np.int32) for reply in replies)
    return Example(np.array(prefix, np.int32), replies, tuple(reply % 2 == 1 for reply in replies))


def as_lists(examples):
    """Plain values of all examples, to compare."""
    return [(e.prefix.tolist(), [r.tolist() for r in e.replies], [mask.tolist() for mask in e.loss]) for e in examples]


def with_ends(tokenizer, text):
    """[BOS] tokens EOS"""
    return [
        *([] if tokenizer.bos_id is None else [tokenizer.bos_id]),
        *tokenizer.encode(text),
        tokenizer.eos_id,
    ]


# Reading


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz", "data"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_under_every_name_gives_the_same_records(layout, name, file):
    content = LAYOUTS[layout](TEXTS).encode()
    path = file(gzip.compress(content) if name.endswith(".gz") else content, name)
    assert [record for _, record in records.read_records(path)] == TEXTS


def test_gzip_is_detected_by_its_content(file):
    path = file(gzip.compress(lines(TEXTS).encode()), "data.jsonl")
    assert [record for _, record in records.read_records(path)] == TEXTS


def test_a_record_is_located_by_its_line_or_its_number(file):
    path = file("\n" + lines(TEXTS), "a.jsonl")
    assert [where for where, _ in records.read_records(path)] == [f"{path} line {n}" for n in (2, 3, 4)]
    path = file(json.dumps(document(TEXTS)), "a.json")
    assert [where for where, _ in records.read_records(path)] == [f"{path} record {n}" for n in (1, 2, 3)]


def test_json_lines_are_read_as_they_are_consumed(file):
    reader = records.read_records(file(lines(TEXTS) + "broken"))
    assert [next(reader)[1] for _ in TEXTS] == TEXTS
    with pytest.raises(ValueError, match="line 4 column 1: is not JSON"):
        next(reader)


# Texts


def test_a_text_is_one_document_with_loss_on_every_token(tokenizer, file):
    examples, report = dataset.read(Task.SFT, [file(lines(TEXTS))], tokenizer, 512)
    tokens = [with_ends(tokenizer, record["text"]) for record in TEXTS]
    assert as_lists(examples) == [([], [ids], [[True] * len(ids)]) for ids in tokens]
    assert str(report) == "3 records of text_only: all kept; keys passed over: extra"


def test_a_text_of_max_length_is_kept_and_a_longer_one_is_dropped(tokenizer, file):
    path = file(lines(TEXTS))
    longest = max(len(with_ends(tokenizer, record["text"])) for record in TEXTS)
    assert len(dataset.read(Task.SFT, [path], tokenizer, longest)[0]) == 3
    examples, report = dataset.read(Task.SFT, [path], tokenizer, longest - 1)
    assert len(examples) == 2 and examples.lengths.max() < longest
    assert str(report) == (
        f"3 records of text_only: 2 kept; dropped 1 longer than --max_length {longest - 1}; keys passed over: extra"
    )


def test_an_empty_text_is_dropped_and_counted(plain, file):
    path = file(lines([{"text": ""}, {"text": " "}, {"text": ""}, {"text": "the cat " * 600}]))
    examples, report = dataset.read(Task.SFT, [path], plain, 512)
    assert examples.record.tolist() == [1]
    assert str(report) == "4 records of text_only: 1 kept; dropped 2 with empty text, 1 longer than --max_length 512"


def test_an_eos_string_in_a_text_stays_text(plain, file):
    examples, _ = dataset.read(Task.SFT, [file(lines([{"text": "a<|endoftext|>"}]))], plain, 512)
    assert (examples.tokens == plain.eos_id).sum() == 1 and examples.tokens[-1] == plain.eos_id


# Pairs


def test_a_pair_is_two_full_texts_split_after_their_common_tokens(tokenizer, file):
    examples, report = dataset.read(Task.PREFERENCE, [file(lines(PAIRS))], tokenizer, 512)
    for record, got in zip(PAIRS, examples, strict=True):
        full = [[*got.prefix, *reply] for reply in got.replies]
        assert full == [with_ends(tokenizer, record["positive"]), with_ends(tokenizer, record["negative"])]
        first = [reply[0] for reply in got.replies]
        assert first[0] != first[1] or min(map(len, got.replies)) == 1
        assert [mask.all() and len(mask) for mask in got.loss] == [len(reply) for reply in got.replies]
    assert str(report) == "4 records of positive/negative: all kept"


def test_a_pair_of_equal_texts_is_dropped_and_counted(tokenizer, file):
    equal = {"chosen": "same", "rejected": "same"}
    examples, report = dataset.read(
        Task.PREFERENCE, [file(lines([equal, {"chosen": "same", "rejected": "other"}]))], tokenizer, 512
    )
    assert examples.record.tolist() == [1] and report.dropped == {"with equal texts that are graded differently": 1}


def test_an_empty_text_of_a_pair_is_its_eos(plain, file):
    (pair,), report = dataset.read(Task.PREFERENCE, [file(lines([{"chosen": "", "rejected": "a"}]))], plain, 512)
    assert pair.replies[0].tolist() == [plain.eos_id] and not report.dropped


def test_chosen_and_rejected_mean_positive_and_negative(plain, file):
    renamed = [{"chosen": r["positive"], "rejected": r["negative"], "subset": "unused"} for r in PAIRS]
    one, _ = dataset.read(Task.PREFERENCE, [file(lines(PAIRS), "a")], plain, 512)
    other, _ = dataset.read(Task.PREFERENCE, [file(json.dumps(document(renamed, type="whatever")), "b")], plain, 512)
    assert as_lists(one) == as_lists(other) and one.hash == other.hash


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_pair_with_either_text_over_max_length_is_dropped(side, tokenizer, file):
    long = {"positive": "a", "negative": "b"} | {side: "the cat sat on the mat"}
    longest = len(with_ends(tokenizer, long[side]))
    path = file(lines([long, PAIRS[1], long]))
    assert len(dataset.read(Task.PREFERENCE, [path], tokenizer, longest)[0]) == 3
    examples, report = dataset.read(Task.PREFERENCE, [path], tokenizer, longest - 1)
    assert examples.record.tolist() == [1]
    assert (report.kept, report.dropped) == (1, {f"longer than --max_length {longest - 1}": 2})


def test_record_indices_count_over_all_files(plain, file):
    long = {"text": "the cat " * 600}
    paths = [
        file(lines([TEXTS[0], long]), "a"),
        file(json.dumps([long, TEXTS[1]]), "b"),
        file(lines(TEXTS), "c"),
    ]
    examples, _ = dataset.read(Task.SFT, paths, plain, 512)
    assert examples.record.tolist() == [0, 3, 4, 5, 6]


def test_records_of_several_tokenizer_batches_stay_in_order(plain, file):
    records = [{"text": f"number {i}"} for i in range(2500)]
    examples, report = dataset.read(Task.SFT, [file(lines(records))], plain, 512)
    assert str(report) == "2,500 records of text_only: all kept"
    assert examples.record.tolist() == list(range(2500))
    assert [examples[i].replies[0].tolist() for i in (0, 1023, 1024, 2499)] == [
        with_ends(plain, f"number {i}") for i in (0, 1023, 1024, 2499)
    ]


ids = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(texts=st.lists(ids, min_size=2, max_size=4))
def test_the_common_prefix_is_the_longest_that_leaves_every_text_a_token(texts):
    shared = encode.common_prefix([np.array(text) for text in texts])
    valid = [n for n in range(9) if all(len(text) > n and text[:n] == texts[0][:n] for text in texts)]
    assert shared == max(valid)


# Storage

ragged = st.lists(st.builds(lambda p, r: example(p, *r), st.lists(st.integers(0, 99)), st.lists(ids, min_size=1)))


@given(originals=ragged)
def test_examples_equal_what_was_stored(originals):
    examples = Examples.build(iter(originals))
    assert as_lists(examples) == as_lists(originals) and len(examples) == len(originals)
    assert examples.lengths.tolist() == [len(e.prefix) + sum(map(len, e.replies)) for e in originals]
    assert examples.record.tolist() == list(range(len(originals)))
    assert (examples.tokens.dtype, examples.loss.dtype) == (np.int32, bool)


@given(originals=ragged, first=st.integers(-9, 9), last=st.none() | st.integers(-9, 9))
def test_a_slice_of_examples_is_a_view_that_shares_their_tokens(originals, first, last):
    whole = Examples.build(originals)
    view = whole[first:last]
    assert as_lists(view) == as_lists(originals[first:last])
    assert view.hash == Examples.build(originals[first:last]).hash
    assert view.record.tolist() == whole.record[first:last].tolist()
    assert not len(view) or np.shares_memory(view.tokens, whole.tokens)


@given(originals=ragged)
def test_the_arrays_of_examples_and_of_views_locate_every_example(originals):
    whole = Examples.build([example([1], [2]), *originals])
    for examples in (whole, whole[1:]):
        for i, e in enumerate(examples):
            assert examples.tokens[examples.starts[i]] == [*e.prefix, *e.replies[0]][0]
            assert examples.prefix_lengths[i] == len(e.prefix)
            own_replies = slice(*examples.reply_offsets[i : i + 2])
            assert examples.reply_lengths[own_replies].tolist() == [len(reply) for reply in e.replies]


def test_examples_are_indexed_like_a_list():
    examples = Examples.build([example([], [i]) for i in range(3)])
    assert examples[-1].replies[0].tolist() == examples[np.int64(2)].replies[0].tolist() == [2]
    with pytest.raises(IndexError):
        examples[3]


@given(originals=ragged)
def test_saved_examples_open_equal_and_read_only(originals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "new" / "folder"
    examples = Examples.build(originals, record=range(5, 5 + len(originals)))[1:]
    examples.save(folder)
    opened = Examples.open(folder)
    assert as_lists(opened) == as_lists(examples) and opened.hash == examples.hash
    assert opened.record.tolist() == examples.record.tolist()
    assert not opened.tokens.flags.writeable or not len(opened)


def test_the_hash_of_examples_depends_on_all_their_content():
    variants = [
        [example([1, 2], [3, 4])],
        [example([1, 2], [3, 5])],
        [example([1], [2, 3, 4])],
        [example([1, 2], [3], [4])],
        [example([1, 2], [3]), example([], [4])],
        [Example(np.array([1, 2]), (np.array([3, 4]),), (np.array([True, True]),))],
        [],
    ]
    assert len({Examples.build(examples).hash for examples in variants}) == len(variants)
    assert Examples.build(variants[0]).hash == Examples.build(variants[0], record=[7]).hash


# Bad input


def assert_one_line_error(run, *parts):
    """`run` raises a ValueError without a chained one, whose message is one line and contains all the parts."""
    with pytest.raises(ValueError) as caught:
        run()
    error = caught.value
    message = str(error)
    assert type(error) is ValueError and (not error.__context__ or error.__suppress_context__)
    assert all(part in message for part in parts) and "\n" not in message, message
    message.encode()


GOOD = lines(TEXTS)
GZIPPED = gzip.compress(lines([{"text": f"{i} {i * i}"} for i in range(999)]).encode())
BAD_FILES = {
    "empty": ("a.json", "", ["the file is empty", 'expected {"instances"']),
    "blank": ("a.jsonl", " \n\n", ["the file is empty"]),
    "empty gzip": ("a.gz", b"", ["the file is empty"]),
    "gzip of nothing": ("a.gz", gzip.compress(b""), ["the file is empty"]),
    "no records": ("a.json", '{"type": "text_only", "instances": []}', ["holds no records, but []"]),
    "empty list": ("a.json", "[]", ["holds no records, but []"]),
    "no instances": ("a.json", '{\n"train": [1]}', ["holds no records, but {'train': [1]}", 'expected {"instances"']),
    "no records in data": ("a.json", '{"data": [1]}', ["a.json record 1: is 1, not a JSON object"]),
    "instances of the wrong type": (
        "a.json",
        '{"instances": {"text": "a"}}',
        ["holds no records, but {'text': 'a'}"],
    ),
    "broken line": ("a.jsonl", GOOD + '{"text": "a"\n' + GOOD, ["a.jsonl line 4 column 13: is not JSON"]),
    "broken first line": ("a.jsonl", '{"text": "a"\n' + GOOD, ["a.jsonl line 1 column 13: is not JSON"]),
    "two records on a line": (
        "a.jsonl",
        GOOD + '{"text": "a"} {"text": "b"}',
        ["line 4 column 15", "Extra data"],
    ),
    "broken document": (
        "a.json",
        '{"instances": [\n{"text": "a"},\n{"text" "b"}]}',
        ["a.json line 3 column 9"],
    ),
    "unfinished document": ("a.json", '\n\n[\n{"text": "a"},\n', ["a.json line 4 column 15: is not JSON"]),
    "more after a document": (
        "a.json",
        json.dumps(TEXTS) + "\n" + GOOD,
        ["a.json line 2 column 1", "Extra data"],
    ),
    "not JSON": ("a.json", "text: hello", ["a.json line 1 column 1: is not JSON"]),
    "deep": ("a.json", "[" * 100_000, ["a.json line 1: cannot be read as JSON"]),
    "huge number": ("a.jsonl", '{"text": ' + "1" * 5000 + "}", ["a.jsonl line 1: cannot be read as JSON"]),
    "latin-1": (
        "a.jsonl",
        GOOD.encode() + b'{"text": "caf\xe9"}',
        ["line 4 is not UTF-8", "save the file as UTF-8"],
    ),
    "UTF-16": ("a.json", GOOD.encode("utf-16"), ["line 1 is not UTF-8"]),
    "latin-1 document": ("a.json", b'[\n{"text": "caf\xe9"}]', ["line 2 is not UTF-8"]),
    "truncated gzip": ("a.jsonl.gz", GZIPPED[:-500], ["cannot be read beyond line", "end-of-stream"]),
    "damaged gzip": ("a.jsonl.gz", GZIPPED[:60] + b"\xff" * 60 + GZIPPED[120:], ["cannot be read beyond line"]),
    "not gzip": ("a.jsonl.gz", GOOD, ["cannot be read beyond line 0", "Not a gzipped file"]),
    "record is a list": ("a.jsonl", GOOD + '["text"]', ["a.jsonl line 4: is ['text'], not a JSON object"]),
    "record is a string": ("a.json", '["a", {"text": "a"}]', ["a.json record 1: is 'a', not a JSON object"]),
    "record is null": ("a.json", '{"instances": [{"text": "a"}, null]}', ["a.json record 2: is None"]),
    "scalar": ("a.json", "5", ["holds no records, but 5"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_one_line_error_with_the_location(case, plain, file):
    name, content, parts = BAD_FILES[case]
    path = file(content, name)
    assert_one_line_error(lambda: dataset.read(Task.SFT, [path], plain, 512), str(path), *parts)


BAD_TEXTS = {
    "other key": (
        {"content": "a", "id": 1},
        ["has the keys 'content', 'id', which are no known schema", "--data_keys prompt=KEY response=KEY"],
    ),
    "no keys": ({}, ["has the keys none"]),
    "a pair": (PAIRS[0], ["has the keys 'positive', 'negative'", "train_rm.py"]),
    "null": ({"text": None}, ["has the keys none with a value"]),
    "messages": (
        {"text": [{"role": "user", "content": "hi"}]},
        ["'text' is [{", "expected a string"],
    ),
    "number": ({"text": 5}, ["'text' is 5"]),
    "half a surrogate pair": ({"text": "a\ud83d"}, ["'text' has half of a surrogate pair"]),
    "half a surrogate pair in a key": ({"\ud83d": "a"}, ["has the key '\\ud83d'"]),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_record_is_an_error_with_its_number(case, plain, file):
    record, parts = BAD_TEXTS[case]
    path = file(json.dumps(document([TEXTS[0], record], type="text_only")), "sft.json")
    assert_one_line_error(lambda: dataset.read(Task.SFT, [path], plain, 512), f"{path} record 2", *parts)
    path = file(lines([TEXTS[0], record]), "sft.jsonl")
    assert_one_line_error(lambda: dataset.read(Task.SFT, [path], plain, 512), f"{path} line 2", *parts)


BAD_PAIRS = {
    "a text": (TEXTS[0], ["has the keys 'text'", "a record of text_only, for train_sft.py"]),
    "one side": ({"chosen": "a", "prompt": "b"}, ["has the keys 'chosen', 'prompt'"]),
    "mixed names": ({"chosen": "a", "negative": "b"}, ["has the keys 'chosen', 'negative'"]),
    "messages": (
        {"chosen": [{"role": "user"}], "rejected": []},
        ["'chosen 1' is {'role': 'user'}; expected an object"],
    ),
    "second side": ({"chosen": "a", "rejected": 0}, ["'rejected' is 0; expected a string"]),
    "surrogate": ({"chosen": "a", "rejected": "\udc00"}, ["'rejected' has half of a surrogate pair"]),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_pair_is_an_error_with_its_line(case, plain, file):
    record, parts = BAD_PAIRS[case]
    path = file(lines([*PAIRS, record]), "pairs.jsonl")
    assert_one_line_error(lambda: dataset.read(Task.PREFERENCE, [path], plain, 512), f"{path} line 5", *parts)


@pytest.mark.parametrize("task", [Task.SFT, Task.PREFERENCE])
def test_a_path_that_is_no_readable_file_is_an_error_that_names_it(task, plain, tmp_path):
    read = functools.partial(dataset.read, task)
    assert_one_line_error(
        lambda: read([tmp_path / "missing.json"], plain, 512), str(tmp_path / "missing.json"), "no such file"
    )
    assert_one_line_error(lambda: read([tmp_path], plain, 512), str(tmp_path), "is a folder; name the files in it")
    assert_one_line_error(
        lambda: read(["Anthropic/hh-rlhf"], plain, 512), "Anthropic/hh-rlhf: no such file", "or hub:org/name/FILE"
    )
    assert_one_line_error(lambda: read([""], plain, 512), "no such file")
    assert_one_line_error(lambda: read(["a\0b"], plain, 512), "null byte")
    assert_one_line_error(lambda: read(["a" * 5000], plain, 512), "too long")
    assert_one_line_error(lambda: read([], plain, 512), "no file given")


def test_dropping_every_record_is_an_error_with_the_reasons(plain, file):
    path = file(lines([*TEXTS, {"text": ""}]))
    assert_one_line_error(
        lambda: dataset.read(Task.SFT, [path], plain, 1),
        f"{path}: 4 records of text_only: 0 kept; dropped 1 with empty text, 3 longer than --max_length 1",
        "no example is left",
        "raise --max_length",
    )


# Files together


def test_formats_may_be_mixed_and_are_counted_in_the_report(plain, file):
    other = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    examples, report = dataset.read(Task.PREFERENCE, [file(lines(PAIRS), "a"), file(lines(other * 2), "b")], plain, 512)
    assert len(examples) == 6 and report.files == [4, 2]
    assert str(report) == (
        "6 records of positive/negative (4) and prompt/chosen/rejected (2), bare prompts and replies joined: all kept"
    )


def test_parquet_records_equal_those_of_json_and_null_means_absent(plain, file, tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = [
        *({"prompt": None, "chosen": r["positive"], "rejected": r["negative"], "margin": None} for r in PAIRS * 300),
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "pairs", row_group_size=100)
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), tmp_path / "chat.parquet")
    located = list(records.read_records(tmp_path / "pairs"))
    assert [record for _, record in located] == written
    assert located[-1][0] == f"{tmp_path / 'pairs'} record 1201"
    formats = dataset.read(Task.PREFERENCE, [tmp_path / "pairs"], plain, 512)[1].formats
    assert formats == {"chosen/rejected": 1200, "prompt/chosen/rejected": 1}
    assert [record for _, record in records.read_records(tmp_path / "chat.parquet")] == [{"messages": chat}]


def test_a_broken_parquet_file_is_an_error_that_names_it(plain, file):
    pytest.importorskip("pyarrow")
    path = file(b"PAR1" + b"x" * 99, "a.parquet")
    assert_one_line_error(
        lambda: dataset.read(Task.SFT, [path], plain, 512), f"{path}: cannot be read beyond record 0", "copy it again"
    )


def test_weights_repeat_or_drop_examples_by_file_and_seed():
    record, files = np.array([0, 1, 3, *range(4, 2004)]), [2, 2, 2000]
    taken = dataset.weighted(record, files, (2, 1, 0.25), seed=1)
    assert taken[:5].tolist() == [0, 0, 1, 1, 2] and np.unique(taken[5:]).size == len(taken[5:])
    assert 440 < len(taken[5:]) < 560 and (np.diff(taken) >= 0).all()
    assert taken.tolist() == dataset.weighted(record, files, (2, 1, 0.25), seed=1).tolist()
    assert taken.tolist() != dataset.weighted(record, files, (2, 1, 0.25), seed=2).tolist()


def test_weights_apply_to_the_training_set_and_not_to_the_held_out_set(plain, file, tmp_path, monkeypatch):
    paths = tuple(str(file(lines([{"text": f"{name} {i}"} for i in range(20)]), name)) for name in "ab")
    data = DataSettings(dataset_path=paths, cache_dir=str(tmp_path / "cache"))
    mixture = MixtureSettings(dataset_weights=(3.0, 1.0))
    held = SplitSettings(validation_split_percentage=50)
    messages = []
    monkeypatch.setattr(dist, "say", messages.append)
    with dist.session(0):
        loaded = dataset.load(Task.SFT, data, TextSettings(), mixture, held, plain, seed=0)
    train, held_out = loaded.train, loaded.held_out[UNNAMED]
    assert len(np.unique(held_out.record)) == len(held_out) == 20 and not np.isin(held_out.record, train.record).any()
    assert np.unique(train.record[train.record < 20], return_counts=True)[1].tolist() == [3] * (
        20 - (held_out.record < 20).sum()
    )
    assert (train.record >= 20).sum() + (held_out.record >= 20).sum() == 20
    assert messages == ["data: 40 records of text_only: all kept", f"weights 3 1: {len(train):,} examples"]
    with dist.session(0):
        mixture = MixtureSettings(max_train_samples=15, dataset_weights=(3.0, 1.0))
        few = dataset.load(Task.SFT, data, TextSettings(), mixture, held, plain, seed=0)
    assert np.array_equal(few.held_out[UNNAMED].record, held_out.record)
    assert np.unique(few.train.record).tolist() == np.unique(train.record)[:15].tolist()
    assert few.facts["train"]["trained_on"] == len(few.train) and few.facts["train"]["kept"] == 40


def test_invalid_settings_are_refused():
    data = DataSettings(dataset_path=("a", "b"))
    with pytest.raises(ValueError, match="one number for each file of --dataset_path, got 1 for 2 files"):
        dataset.check_mixture(data, MixtureSettings(dataset_weights=(1.0,)))
    with pytest.raises(ValueError, match="must be positive, got 1.0 0.0"):
        MixtureSettings(dataset_weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="--dataset_weights must be a finite number, got inf"):
        MixtureSettings(dataset_weights=(1.0, float("inf")))
    with pytest.raises(ValueError, match="exclude each other"):
        TextSettings(chat_template="a", dialogue_format="hh")


def test_the_cache_depends_on_file_template_and_settings(plain, file, tmp_path):
    path = file(lines([{"messages": [{"role": "assistant", "content": "the cat sat on the mat"}]}, {"text": "a"}]))
    template = tmp_path / "template"

    def read_tokens(**flags):
        text, cache_dir = TextSettings(**flags), str(tmp_path / "cache")
        return dataset.read_cached(Task.SFT, [str(path)], text, plain, cache_dir)[0].tokens.tolist()

    template.write_text("{{ messages[0].content }}")
    with dist.session(0):
        results = [read_tokens(chat_template=str(template))]
        results += [read_tokens(dialogue_format="hh"), read_tokens(dialogue_format="anthropic")]
        for side in ("left", "right"):
            results.append(read_tokens(dialogue_format="hh", max_length=9, overlong="truncate", truncation_side=side))
        results.append(read_tokens(dialogue_format="hh", max_length=9))
        template.write_text("so: {{ messages[0].content }}")
        results.append(read_tokens(chat_template=str(template)))
        file(lines([{"text": "b"}]))
        results.append(read_tokens(chat_template=str(template)))
        n_entries = len(list((tmp_path / "cache").iterdir()))
        assert len({str(tokens) for tokens in results}) == len(results) == n_entries
        assert read_tokens(chat_template=str(template)) == results[-1]
        assert len(list((tmp_path / "cache").iterdir())) == n_entries


def test_samples_are_read_up_to_the_last_one_requested(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "0"}\n{"text": "1"}\n')
    second.write_text('{"text": "2"}\n{"text": "3"}\nnot JSON\n')
    found = [(f.number, f.where, f.sample.texts) for f in SampleReader(SFT).read([first, second], {1, 3})]
    assert found == [(1, f"{first} line 2", ["1"]), (3, f"{second} line 2", ["3"])]
    assert list(SampleReader(SFT).read([tmp_path / "missing"], set())) == []


TABLE = [{"prompt": "hi, you", "chosen": 'say "yes"', "rejected": "no\nno", "label": "0.25"}] * 2


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "columns.json", "pandas.json", "data.json"])
def test_tables_are_read_as_json_lines_are(name, file, plain, tmp_path):
    columns = {key: [row[key] for row in TABLE] for key in TABLE[0]}
    path = tmp_path / name
    if name == "columns.json":
        path.write_text(json.dumps(columns))
    elif name == "pandas.json":
        indexed = {key: {str(i): value for i, value in enumerate(values)} for key, values in columns.items()}
        path.write_text(json.dumps(indexed))
    elif name == "data.json":
        path.write_text(json.dumps({"version": 1, "data": TABLE}))
    else:
        with gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w") as out:
            writer = csv.DictWriter(out, list(columns), delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(TABLE)
    examples, report = dataset.read(Task.PREFERENCE, [path], plain, 512)
    expected, _ = dataset.read(Task.PREFERENCE, [file(lines(TABLE))], plain, 512)
    assert examples.hash == expected.hash and report.formats == {"prompt/chosen/rejected": 2}
    assert examples.label.tolist() == [0.25, 0.25]


def test_a_row_with_too_few_or_too_many_fields_is_named(tmp_path, plain):
    for rows in ("prompt,chosen,rejected\na,b,c\nd,e\n", "prompt,chosen,rejected\na,b,c\nd,e,f,g\n"):
        (tmp_path / "a.csv").write_text(rows)
        assert_one_line_error(
            lambda: dataset.read(Task.PREFERENCE, [tmp_path / "a.csv"], plain, 512),
            "a.csv record 2: has not as many fields as the first line has names",
        )


def test_a_single_reply_is_left_out_of_preferences_but_scored(plain, file):
    rows = [{"prompt": p, "response": r, "helpfulness": g} for p, r, g in [("a", "b", 1), ("a", "c", 2), ("d", "e", 3)]]
    examples, report = dataset.read(Task.PREFERENCE, [file(lines(rows))], plain, 512)
    assert examples.record.tolist() == [0] and report.dropped == {"with fewer than two replies to compare": 1}
    assert len(dataset.read(Task.SCORING, [file(lines(rows))], plain, 512)[0]) == 2


def test_replies_that_nobody_judged_are_left_out(plain, file):
    """search-arena-24k has nulls among its winners, UltraFeedback prompts without completions."""
    sides = {f"messages_{side}": [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}]
             for side in "ab"}  # fmt: skip
    rows = [sides | {"winner": "model_b"}, sides | {"winner": None}, {"instruction": "q", "completions": []}]
    template = chat.choose_template(None, "hh", plain)
    examples, report = dataset.read(Task.PREFERENCE, [file(lines(rows))], plain, 512, template)
    assert examples.record.tolist() == [0]
    assert report.dropped == {
        "without ranks, scores or a winner, so no reply is known to be better": 1,
        "with fewer than two replies to compare": 1,
    }


@pytest.mark.parametrize("key", ["thinking_trajectories", "deepseek_thinking_trajectory"])
def test_a_thought_under_an_unknown_name_is_refused(key, plain, file):
    rows = [{"question": "1+1?", "solution": "2", key: ["One and one."]}]
    assert_one_line_error(lambda: dataset.read(Task.SFT, [file(lines(rows))], plain, 512), f"has '{key}' beside")


def test_prompts_that_run_into_their_replies_and_keys_that_are_not_there_are_said(plain, file):
    rows = [{"prompt": "2+2?", "response": "4", "id": 1}, {"prompt": "2+2?\n", "response": "4", "id": 2}]
    keys = KeySettings(ignore_keys=("id", "sorce"))
    _, report = dataset.read(Task.SFT, [file(lines(rows))], plain, 512, bare_text="plain", keys=keys)
    assert report.warnings[0] == "no record has the key of --ignore_keys sorce"
    assert report.warnings[1].startswith("1 records have a prompt and a reply that are joined without a blank")
    assert len(report.warnings) == 2


def test_a_column_that_stands_twice_is_named(tmp_path, plain):
    (tmp_path / "a.CSV").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    assert_one_line_error(lambda: dataset.read(Task.PREFERENCE, [tmp_path / "a.CSV"], plain, 512), "has a column twice")


def test_a_record_of_messages_in_a_file_of_its_own_is_no_table(tmp_path, plain):
    record = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(record | {"rejected": [{"role": "assistant", "content": "c"}]}))
    template = chat.choose_template(None, "hh", plain)
    examples, _ = dataset.read(Task.PREFERENCE, [tmp_path / "a.json"], plain, 512, template)
    assert len(examples) == 1


def test_long_rows_of_parquet_are_read_few_at_a_time(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": os.urandom(500).hex()} for _ in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    sizes = []
    iter_batches = parquet.ParquetFile.iter_batches

    def counted(self, batch_size):
        sizes.append(batch_size)
        return iter_batches(self, batch_size)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(records, "PARQUET_BATCH", 20_000)
    assert [record for _, record in records.read_records(tmp_path / "a.parquet")] == rows
    monkeypatch.setattr(records, "PARQUET_BATCH", 10**9)
    assert len(list(records.read_records(tmp_path / "a.parquet"))) == 3000
    assert 10 < sizes[0] < 40 and sizes[1] == 64


def test_warnings_say_what_a_person_should_know_of_the_data(plain, file):
    def warnings(records):
        return dataset.read(Task.PREFERENCE, [file(lines(records))], plain, 512)[1].warnings

    pair = {"prompt": "a\n", "chosen": "b", "rejected": "c"}
    assert warnings([pair, pair | {"label": 1}, pair | {"label": 0.5}]) == ()
    (warning,) = warnings([pair | {"label": 1}, pair | {"label": 0}])
    assert warning.startswith("'label' is 0 in 1 records and never between 0 and 1.")
    (warning,) = warnings([pair | {"score_chosen": 1.0, "score_rejected": 1.0}, pair | {"status": "tie"}])
    assert warning.startswith("2 pairs have equal scores on both sides")
    (warning,) = warnings([pair, {"chosen": "a<|endoftext|>", "rejected": "b"}])
    assert warning.startswith("1 records have plain texts with strings such as") and "--parse_special_tokens" in warning
    keys = KeySettings(data_keys=("prompt=a", "chosen=god"))
    report = dataset.read(Task.PREFERENCE, [file(lines([pair | {"a": "q\n"}]))], plain, 512, keys=keys)[1]
    assert report.warnings == ("no record has the key of --data_keys chosen=god",)


def test_special_tokens_of_plain_texts_are_parsed_where_a_setting_says_so(plain, file):
    end = plain.eos_id
    texts = {
        "a<|endoftext|>b": [*plain.encode("a"), end, *plain.encode("b"), end],
        "a<|endoftext|>": [*plain.encode("a"), end],
        "a<|endoftext|>\n": [*plain.encode("a"), end, *plain.encode("\n")],
        "a": [*plain.encode("a"), end],
    }
    path = file(lines([{"text": text} for text in texts]))
    examples, report = dataset.read(Task.SFT, [path], plain, 512, parse_special_tokens=True)
    assert [example.replies[0].tolist() for example in examples] == list(texts.values())
    assert all(example.loss[0].all() for example in examples) and not report.warnings
    pair = {"input": "x<|endoftext|>y", "output": "z<|endoftext|>"}
    (one,), _ = dataset.read(Task.SFT, [file(lines([pair]))], plain, 512, parse_special_tokens=True)
    assert one.replies[0][one.loss[0]].tolist() == [*plain.encode("z"), end]


def test_a_second_bos_is_not_added_to_a_text_that_begins_with_it(tmp_path, file):
    tokenizer = Tokenizer(llama_like(tmp_path / "model"))
    assert tokenizer.bos_id is not None
    path = file(lines([{"text": "<s>the</s>"}, {"text": "the"}]))
    examples, _ = dataset.read(Task.SFT, [path], tokenizer, 512, parse_special_tokens=True)
    for example in examples:
        assert [example.replies[0].tolist().count(i) for i in (tokenizer.bos_id, tokenizer.eos_id)] == [1, 1]


def test_a_text_far_too_long_is_not_tokenized_whole(plain, file, monkeypatch):
    encoded = []
    encode_parts, encode_batch = Tokenizer.encode_parts, Tokenizer.encode_batch

    def count_parts(self, texts):
        encoded.extend(len(part) for parts in texts for part in parts if isinstance(part, str))
        return encode_parts(self, texts)

    def count_batch(self, texts):
        encoded.extend(map(len, texts))
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_parts", count_parts)
    monkeypatch.setattr(Tokenizer, "encode_batch", count_batch)
    path = file(lines([{"chosen": "the cat " * 100_000, "rejected": "b"}, {"chosen": "a", "rejected": "b"}]))
    examples, report = dataset.read(Task.PREFERENCE, [path], plain, 64)
    assert len(examples) == 1 and report.dropped == {"longer than --max_length 64": 1}
    assert max(encoded) <= 32 * 64


def test_the_replies_that_carry_loss_are_chosen(tmp_path, file):
    tokenizer = Tokenizer(folder_of("Qwen2.5", tmp_path / "qwen"))
    template = chat.choose_template(None, None, tokenizer)
    contents = ["a", "one", "b", "two", "c", "six"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]

    def trained(train_on="all", **weights):
        marked = [m | ({"weight": weights[m["content"]]} if m["content"] in weights else {}) for m in messages]
        path = file(lines([{"messages": marked}, {"text": "other"}]))
        examples, report = dataset.read(Task.SFT, [path], tokenizer, 512, template, train_on=train_on)
        texts = []
        if len(examples) == 2:
            ids = examples[0].replies[0][examples[0].loss[0]]
            texts = tokenizer._model.model.decode(ids, skip_special_tokens=False).split("<|im_end|>")[:-1]
        return texts, report.dropped

    assert trained() == (["one", "two", "six"], {})
    assert trained(one=0, two=1) == (["two", "six"], {})
    assert trained("last") == (["six"], {})
    assert trained("last", six=0) == trained(one=0, two=0, six=0) == ([], {"without a token that carries loss": 1})


def test_what_has_no_end_is_refused(tmp_path, plain, monkeypatch):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    for name, reason in (("fifo.jsonl", "is neither a file nor a folder"), ("circle.jsonl", "symbolic links")):
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            dataset.read_cached(Task.SFT, [str(tmp_path / name)], TextSettings(), plain, str(tmp_path))
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            next(records.read_records(tmp_path / name))
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    monkeypatch.setattr(records, "MOST_BLANK", 1000)
    for content, reason in ((b" " * 2000, "more than 1,000 bytes"), (b"\n" * 2000, "lines are blank")):
        (tmp_path / "bomb.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=f"bomb.gz: .*{reason}"):
            next(records.read_records(tmp_path / "bomb.gz"))
    monkeypatch.setattr(records, "FREE", 1000)
    (tmp_path / "lines.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000))
    with pytest.raises(ValueError, match="lines.gz: .*it unpacks to more than"):
        list(records.read_records(tmp_path / "lines.gz"))
