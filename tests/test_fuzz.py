"""Whatever a file holds, reading it ends in examples or in one line that says what is wrong: never in anything else."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rm.data import chat, dataset
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of

SPECIAL = [
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
MARKS = ["\n\nHuman:", "\n\nAssistant:", "###Human:", "###Assistant: ", "\x00", "\u2028", "\ud83d", "\ufeff", "🙂", "a"]
texts = st.lists(st.sampled_from(SPECIAL + MARKS) | st.text(st.characters(), max_size=5), max_size=6).map("".join)
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
wild = st.dictionaries(st.sampled_from(KEYS) | texts, values | sides, max_size=5)
likely = st.one_of(
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
FORMS = [None, "own", "hh", "anthropic"]
quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


def survive(read, content: bytes, tokenizer, folder, form=None, **how):
    """The examples of a file of these bytes, or None where there was one clear line instead."""
    path = folder / "file"
    path.write_bytes(content)
    own = str(tokenizer.folder) if form == "own" else None
    template = None if form is None else chat.choose(own, None if own else form, tokenizer)
    try:
        examples, report = read([path], tokenizer, how.get("max_length", 64), template, how.get("cut"))
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1500, message
        message.encode()
        return None
    assert len(examples) == report.kept == len(examples.record) and examples.tokens.max() < tokenizer.vocab_size + 9
    for example in examples:
        ends = {int(reply[-1]) for reply in example.replies}
        assert ends <= {tokenizer.eos_id} and all(map(len, example.replies))
        assert all(len(example.prefix) + len(reply) <= how.get("max_length", 64) for reply in example.replies)
        assert read is dataset.pairs or example.loss[0].any()
    return examples


@quick
@given(
    records=st.lists(wild | likely, max_size=3),
    form=st.sampled_from(FORMS),
    cut=st.sampled_from([None, "left", "right"]),
)
@pytest.mark.parametrize("read", [dataset.texts, dataset.pairs])
def test_any_records(read, records, form, cut, tokenizer, tmp_path):
    content = "\n".join(json.dumps(record) for record in records).encode()
    survive(read, content, tokenizer, tmp_path, form, cut=cut, max_length=24)


@quick
@given(
    content=st.binary(max_size=60)
    | values.map(lambda value: json.dumps(value).encode())
    | texts.map(lambda t: t.encode(errors="replace"))
)
@pytest.mark.parametrize("read", [dataset.texts, dataset.pairs])
def test_any_bytes(read, content, tokenizer, tmp_path):
    survive(read, content, tokenizer, tmp_path)
    survive(read, gzip.compress(content), tokenizer, tmp_path)
    survive(read, b"PAR1" + content, tokenizer, tmp_path)


@quick
@given(asked=texts, said=texts)
def test_nobody_types_a_special_token(asked, said, tokenizer, tmp_path):
    record = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    examples = survive(dataset.texts, json.dumps(record).encode(), tokenizer, tmp_path, "own", max_length=9999)
    if examples is not None:
        im = [tokenizer.special[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
        assert [(examples.tokens == i).sum() for i in im] == [3, 3, 0]


@pytest.mark.parametrize("form, cut", [(None, None), ("own", "left")])
def test_texts_of_a_megabyte(form, cut, tokenizer, tmp_path):
    long = "the cat <|im_end|>🙂\n" * 50_000
    record = {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "a"}]}
    pair = {"prompt": long, "chosen": "a", "rejected": "b"}
    for read, r in ((dataset.texts, record), (dataset.pairs, pair)):
        examples = survive(read, json.dumps(r).encode(), tokenizer, tmp_path, form, cut=cut)
        assert (examples is None) == (cut is None or (form is None and read is dataset.texts))


@pytest.mark.parametrize("depth", [50, 900, 100_000])
def test_deep_nesting(depth, tokenizer, tmp_path):
    deep = "[" * depth + "]" * depth
    for read, record in ((dataset.texts, '{"messages": %s}'), (dataset.pairs, '{"chosen": %s, "rejected": "a"}')):
        assert survive(read, (record % deep).encode(), tokenizer, tmp_path) is None
        fine = record.replace('"messages"', '"text": "a", "more"').replace('"chosen"', '"chosen": "b", "more"')
        assert (survive(read, (fine % deep).encode(), tokenizer, tmp_path) is None) == (depth > 50_000) or depth == 900


def test_one_bad_record_among_thousands_is_named(tokenizer, tmp_path):
    good = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}
    for bad in ({"chosen": "a"}, {"chosen": "a\ud800", "rejected": "b"}, [], None):
        lines = [json.dumps(good)] * 3000
        lines[2345] = json.dumps(bad)
        path = tmp_path / "file"
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match="file line 2346: "):
            dataset.pairs([path], tokenizer, 64)
