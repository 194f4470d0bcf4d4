"""rm.data.split: sizes, whole conversations, the LMFlow recipe's split by order, and the warning."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm.data import dataset
from rm.data.dataset import DataSettings, MixtureSettings, TextSettings
from rm.data.encode import Task
from rm.data.examples import Example, Examples
from rm.data.split import SplitSettings, held_out, leak, split
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from tests.text_fixtures import byte_level

conversations = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), min_size=1, max_size=80)
percentages = st.integers(0, 990).map(lambda tenths: tenths / 10)


def examples(conversation) -> Examples:
    def example(key):
        return Example(np.zeros(0, np.int32), (np.array([1, 2], np.int32),), (np.ones(2, bool),), conversation=key)

    return Examples.build(map(example, conversation))


def mask_or_none(conversation, percentage, by) -> np.ndarray | None:
    try:
        return held_out(np.array(conversation), percentage, by)
    except ValueError:
        return None


@pytest.mark.parametrize("n, percentage, n_held_out", [(100, 0, 0), (100, 5, 5), (3, 5, 1), (7, 50, 4), (1000, 0.1, 1)])
def test_a_split_by_order_holds_out_the_last_records(n, percentage, n_held_out):
    train, test = split(examples([0] * n), percentage, "order")
    assert train.record.tolist() + test.record.tolist() == list(range(n))
    assert len(test) == n_held_out and len(train) == int((1 - percentage / 100) * n)


@given(conversation=conversations, percentage=percentages)
def test_a_split_by_conversation_keeps_them_whole_and_comes_closest(conversation, percentage):
    mask = mask_or_none(conversation, percentage, "conversation")
    if mask is None:
        assert len(set(conversation)) == 1 or percentage > 100 * (1 - 1 / len(conversation))
        return
    conversation = np.array(conversation)
    assert not set(conversation[mask]) & set(conversation[~mask])
    n_wanted = len(mask) - int((1 - percentage / 100) * len(mask))
    sizes = np.cumsum(np.unique(conversation, return_counts=True)[1])[:-1]
    assert abs(mask.sum() - n_wanted) == (abs(sizes - n_wanted).min() if n_wanted else 0)


@given(n=st.integers(2, 80), percentage=percentages)
def test_both_splits_of_single_record_conversations_have_equal_sizes(n, percentage):
    masks = [mask_or_none(range(n), percentage, by) for by in ("order", "conversation")]
    by_order, by_conversation = (None if mask is None else mask.sum() for mask in masks)
    assert by_order == by_conversation


@given(conversation=conversations, percentage=percentages, data=st.data())
def test_a_split_by_conversation_does_not_depend_on_the_files_order(conversation, percentage, data):
    order = data.draw(st.permutations(range(len(conversation))))
    mask = mask_or_none(conversation, percentage, "conversation")
    other = mask_or_none([conversation[i] for i in order], percentage, "conversation")
    assert (mask is None) == (other is None) and (mask is None or mask[order].tolist() == other.tolist())


@pytest.mark.parametrize("by", ["order", "conversation"])
@pytest.mark.parametrize("percentage", [-1, 100, 101, float("nan"), 99])
def test_a_split_that_leaves_nothing_to_train_on_is_an_error(percentage, by):
    with pytest.raises(ValueError, match="--validation_split_percentage must be .* with 5 examples of 5 conv"):
        split(examples(range(5)), percentage, by)


def test_one_conversation_can_only_be_split_by_order():
    with pytest.raises(ValueError, match="with 10 examples of 1 conversations"):
        split(examples([7] * 10), 20, "conversation")
    assert list(map(len, split(examples([7] * 10), 20, "order"))) == [8, 2]


def test_both_sets_keep_the_files_order_and_share_its_tokens():
    whole = examples([5, -3, 5, 8, -3, 1])
    train, test = split(whole, 33, "conversation")
    assert (train.record.tolist(), test.record.tolist()) == ([0, 2, 3, 5], [1, 4])
    assert train.tokens is whole.tokens and test.tokens is whole.tokens
    train, test = split(whole, 0, "conversation")
    assert train is whole and not len(test)


def test_a_leak_warning_has_the_number_of_shared_examples():
    train, test = split(examples([1, 2, 2, 3, 4, 4, 5, 2, 4, 9]), 30, "order")
    assert leak(train, test).startswith("2 of 3 held-out examples belong to conversations that are trained on as well")
    assert leak(*split(examples([1, 2, 2, 3, 4, 4, 5, 2, 4, 9]), 30, "conversation")) is None
    assert leak(train, examples([])) is None


LEAKS = {
    "by order": ({"validation_split_percentage": 30, "validation_split_by": "order"}, ["3 of 3"]),
    "by conversation": ({"validation_split_percentage": 30}, []),
    "a file of its own": ({"eval_dataset_path": ("test.json",)}, ["1 of 2"]),
    "nothing held out": ({}, []),
}


@pytest.mark.parametrize("case", LEAKS)
def test_loading_training_data_warns_of_a_leak(case, tmp_path, monkeypatch):
    def write(name: str, questions: list[int]) -> None:
        records = [{"chosen": f"###Human: {q}###Assistant: {i}", "rejected": "no"} for i, q in enumerate(questions)]
        Path(name).write_text(json.dumps(records))

    monkeypatch.chdir(tmp_path)
    write("pairs.json", [i % 4 for i in range(10)])
    write("test.json", [3, 4])
    tokenizer, messages = Tokenizer(byte_level(tmp_path / "model")), []
    monkeypatch.setattr(dist, "say", messages.append)
    flags, expected = LEAKS[case]
    data, held = DataSettings(dataset_path=("pairs.json",), cache_dir="cache"), SplitSettings(**flags)
    with dist.session(seed=0):
        dataset.load(Task.PREFERENCE, data, TextSettings(), MixtureSettings(), held, tokenizer, seed=0)
    warnings = [line.partition(" held-out")[0] for line in messages if "warning" in line]
    assert warnings == [f"warning: {shares}" for shares in expected]
