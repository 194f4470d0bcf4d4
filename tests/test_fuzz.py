"""Fuzzing of rm.data: reading any file gives examples, or an error of one line that names the file; nothing else."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rm.data import chat, dataset
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of

SPECIAL_STRINGS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "\ufdd0",
    "\ufde0",
    "\ufde1",
    "\ufde2",
    "{{ 1 }}",
    "{%",
]
TEXT_PIECES = [
    "\n\nHuman:",
    "\n\nAssistant:",
    "###Human:",
    "###Assistant: ",
    "\x00",
    "\u2028",
    "\ud83d",
    "\ufeff",
    "🙂",
    "a",
]
texts = st.lists(st.sampled_from(SPECIAL_STRINGS + TEXT_PIECES) | st.text(st.characters(), max_size=5), max_size=6).map(
    "".join
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
KEYS = """text input output messages system tools positive negative chosen rejected prompt responses ranks scores margin
    label subset conversation_id role content""".split()
roles = st.sampled_from(["user", "assistant", "system", "tool"]) | texts
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), min_size=1, max_size=4)
sides = texts | messages | st.fixed_dictionaries({"messages": messages}, optional={"system": texts, "tools": values})
numbers = st.floats() | st.integers()
any_records = st.dictionaries(st.sampled_from(KEYS) | texts, values | sides, max_size=5)
near_valid_records = st.one_of(
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"input": texts, "output": texts}),
    st.fixed_dictionaries({"messages": messages}, optional={"system": texts}),
    st.fixed_dictionaries({"positive": texts, "negative": texts}, optional={"margin": numbers}),
    st.fixed_dictionaries({"chosen": sides, "rejected": sides}, optional={"prompt": sides, "label": numbers}),
    st.integers(0, 4).flatmap(
        lambda k: st.fixed_dictionaries(
            {"prompt": sides, "responses": st.lists(sides, min_size=k, max_size=k)},
            optional={"ranks": st.lists(numbers, min_size=k, max_size=k), "scores": values},
        )
    ),
)
TEMPLATES = [None, "own", "hh", "anthropic"]
quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


def read_or_error(task, content: bytes, tokenizer, folder, template=None, max_length=64, cut=None):
    """The examples of a file with this content, or None if there was a proper error.

    Args:
        template: None, "own" for the model's chat template set explicitly, or a dialogue format.
    """
    path = folder / "file"
    path.write_bytes(content)
    if template == "own":
        template = chat.choose_template(str(tokenizer.folder), None, tokenizer)
    elif template is not None:
        template = chat.choose_template(None, template, tokenizer)
    try:
        examples, report = dataset.read(task, [path], tokenizer, max_length, template, cut)
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1500, message
        message.encode()
        return None
    assert len(examples) == report.kept == len(examples.record) and examples.tokens.max() < tokenizer.vocab_size + 9
    for example in examples:
        last_tokens = {int(reply[-1]) for reply in example.replies}
        line_break = {*tokenizer.encode("\n")} if template is not None and not template.plain else set()
        assert last_tokens <= {tokenizer.eos_id} | line_break and all(map(len, example.replies))
        assert all(len(example.prefix) + len(reply) <= max_length for reply in example.replies)
        assert task is Task.PREFERENCE or example.loss[0].any()
    return examples


@quick
@given(
    records=st.lists(any_records | near_valid_records, max_size=3),
    template=st.sampled_from(TEMPLATES),
    cut=st.sampled_from([None, "left", "right"]),
)
@pytest.mark.parametrize("task", [Task.SFT, Task.PREFERENCE])
def test_any_records_give_examples_or_a_proper_error(task, records, template, cut, tokenizer, tmp_path):
    content = "\n".join(json.dumps(record) for record in records).encode()
    read_or_error(task, content, tokenizer, tmp_path, template, max_length=24, cut=cut)


@quick
@given(
    content=st.binary(max_size=60)
    | values.map(lambda value: json.dumps(value).encode())
    | texts.map(lambda t: t.encode(errors="replace"))
)
@pytest.mark.parametrize("task", [Task.SFT, Task.PREFERENCE])
def test_any_bytes_give_examples_or_a_proper_error(task, content, tokenizer, tmp_path):
    read_or_error(task, content, tokenizer, tmp_path)
    read_or_error(task, gzip.compress(content), tokenizer, tmp_path)
    read_or_error(task, b"PAR1" + content, tokenizer, tmp_path)


@quick
@given(question=texts, reply=texts)
def test_messages_never_add_special_tokens(question, reply, tokenizer, tmp_path):
    record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
    examples = read_or_error(Task.SFT, json.dumps(record).encode(), tokenizer, tmp_path, "own", max_length=9999)
    if examples is not None:
        ids = [tokenizer.special[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
        assert [(examples.tokens == i).sum() for i in ids] == [3, 3, 0]  # of a system message and two turns


@pytest.mark.parametrize("template, cut", [(None, None), ("own", "left")])
def test_texts_of_a_megabyte_are_dropped_or_truncated(template, cut, tokenizer, tmp_path):
    long = "the cat <|im_end|>🙂\n" * 50_000
    record = {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "a"}]}
    pair = {"prompt": long, "chosen": "a", "rejected": "b"}
    for task, r in ((Task.SFT, record), (Task.PREFERENCE, pair)):
        examples = read_or_error(task, json.dumps(r).encode(), tokenizer, tmp_path, template, cut=cut)
        assert (examples is None) == (cut is None or (template is None and task is Task.SFT))


@pytest.mark.parametrize("depth", [50, 900, 100_000])
def test_deep_nesting_gives_examples_or_a_proper_error(depth, tokenizer, tmp_path):
    deep = "[" * depth + "]" * depth
    for task, record in ((Task.SFT, '{"messages": %s}'), (Task.PREFERENCE, '{"chosen": %s, "rejected": "a"}')):
        assert read_or_error(task, (record % deep).encode(), tokenizer, tmp_path) is None
        unused = record.replace('"messages"', '"text": "a", "more"').replace('"chosen"', '"chosen": "b", "more"')
        assert (read_or_error(task, (unused % deep).encode(), tokenizer, tmp_path) is None) == (
            depth > 50_000
        ) or depth == 900


def test_a_bad_record_among_thousands_is_located(tokenizer, tmp_path):
    good = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}
    for bad in ({"chosen": "a"}, {"chosen": "a\ud800", "rejected": "b"}, [], None):
        lines = [json.dumps(good)] * 3000
        lines[2345] = json.dumps(bad)
        path = tmp_path / "file"
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match="file line 2346: "):
            dataset.read(Task.PREFERENCE, [path], tokenizer, 64)
