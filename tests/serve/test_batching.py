"""Dynamic batching: each text's own reward, whichever others are computed with it."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm.serve.batching import Batcher, examples_of, group_tokens, share_prefixes

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


def arrays(texts) -> list[np.ndarray]:
    return [np.array(text, np.int32) for text in texts]


@given(TEXTS, st.integers(8, 40))
def test_every_text_is_in_one_group_which_fits_and_costs_no_more_than_apart(texts, max_tokens):
    texts = arrays(texts)
    groups = share_prefixes(texts, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    costs = [group_tokens([texts[i] for i in group]) for group in groups]
    assert all(cost <= max_tokens for cost in costs) and sum(costs) <= sum(map(len, texts))
    examples = examples_of(texts, groups)
    assert examples.lengths.tolist() == costs
    rebuilt = [np.concatenate([one.prefix, reply]).tolist() for one in examples for reply in one.replies]
    assert rebuilt == [texts[i].tolist() for group in groups for i in group]


def best_cost(texts: list[np.ndarray]) -> int:
    """The fewest tokens of any grouping of neighbours in sorted order, by trying all."""
    texts = sorted(texts, key=lambda text: text.tolist())
    cost = [0]
    for end in range(1, len(texts) + 1):
        cost.append(min(cost[start] + group_tokens(texts[start:end]) for start in range(end)))
    return cost[-1]


def test_replies_to_prompts_with_a_common_system_message_share_each_their_own_prompt():
    system, random = list(range(100, 130)), np.random.default_rng(0)
    prompts = [system + random.integers(0, 50, 40).tolist() for _ in range(5)]
    texts = arrays(p + random.integers(0, 50, 9).tolist() for p in prompts for _ in range(8))
    shuffled = [texts[i] for i in random.permutation(40)]
    groups = share_prefixes(shuffled, 10**6)
    assert [len(group) for group in groups] == [8] * 5
    cost = sum(group_tokens([shuffled[i] for i in group]) for group in groups)
    assert cost == best_cost(texts) == 5 * (70 + 8 * 9)


class Model:
    """Rewards that tell which text they are of; a micro-batch takes a moment, and may be held up."""

    def __init__(self):
        self.go, self.batches, self.fail = threading.Event(), [], False
        self.go.set()

    def __call__(self, examples) -> torch.Tensor:
        self.batches.append(int(examples.lengths.sum()))
        self.go.wait(10)
        if self.fail:
            raise RuntimeError("out of memory")
        texts = [[*one.prefix.tolist(), *reply.tolist()] for one in examples for reply in one.replies]
        return torch.tensor([value(text) for text in texts])


def value(text) -> float:
    return float(sum((i + 1) * token for i, token in enumerate(text)))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, 20, lambda *_: None)
    yield batcher
    model.go.set()
    batcher.close()


def test_what_waits_during_a_micro_batch_is_the_next_one(model, batcher):
    model.go.clear()
    first = batcher.submit(arrays([[1, 2, 3]]))
    while not model.batches:
        time.sleep(0.001)
    others = [batcher.submit(arrays([[7, 7, 7, 7, i]])) for i in range(4)]  # of which four tokens are one prefix
    model.go.set()
    assert first.result(10).tolist() == [value([1, 2, 3])]
    assert [one.result(10).tolist() for one in others] == [[value([7, 7, 7, 7, i])] for i in range(4)]
    assert model.batches == [3, 4 + 4]


def test_a_small_request_does_not_wait_for_all_of_a_large_one(model, batcher):
    model.go.clear()
    large = batcher.submit(arrays([[i] * 10 for i in range(8)]))
    while not model.batches:
        time.sleep(0.001)
    small = batcher.submit(arrays([[9, 9]]))
    finished = []
    large.add_done_callback(lambda _: finished.append("large"))
    small.add_done_callback(lambda _: finished.append("small"))
    model.go.set()
    assert large.result(10).tolist() == [value([i] * 10) for i in range(8)]
    assert finished == ["small", "large"]


def test_a_failure_reaches_its_own_requests_and_a_cancelled_one_is_not_computed(model, batcher):
    model.go.clear()
    model.fail = True
    failing = batcher.submit(arrays([[i] * 15 for i in range(3)]))
    while not model.batches:
        time.sleep(0.001)
    cancelled, later = batcher.submit(arrays([[5] * 15])), batcher.submit(arrays([[6] * 15]))
    cancelled.cancel()
    model.go.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.result(10)
    model.fail = False
    try:
        later.result(10)
    except RuntimeError:
        pass  # it may have been computed before the model was well again
    assert batcher.submit(arrays([[1]])).result(10).tolist() == [1.0] and len(model.batches) == 3


def test_all_that_was_submitted_is_computed_before_the_end(model):
    batcher = Batcher(model, 20, lambda *_: None)
    futures = [batcher.submit(arrays([[i] * 12])) for i in range(10)]
    batcher.close()
    assert [future.result(0).tolist() for future in futures] == [[value([i] * 12)] for i in range(10)]
    assert batcher.submit([]).result(0).tolist() == []
    with pytest.raises(RuntimeError, match="stopping"):
        batcher.submit(arrays([[1]]))
