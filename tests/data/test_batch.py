"""rm.data.batch: what a micro-batch holds, and which rank computes what in which step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm.data import groups, micro_batches
from rm.data.batch import BatchSettings, EvalBatches, Loader, PackingSettings, new_texts, pack, plan_micro_batches
from rm.data.examples import Example, Examples
from tests import made, reference
from tests.made import pair_examples, ranking_examples, text_examples, token_pairs
from tests.ranks import run_ranks


def make_loader(examples: Examples, max_tokens: int = 4096, seed: int = 0, attention_cost: float = 0.0, **settings):
    """A loader; `settings` are of `BatchSettings`."""
    return Loader(examples, BatchSettings(**settings), PackingSettings(max_tokens=max_tokens), seed, attention_cost)


def test_a_shared_pair_is_prefix_chosen_rejected_with_continued_positions():
    micro_batch = pack(pair_examples([([5, 6, 7, 8], [5, 6, 9])]), np.array([0]))
    assert micro_batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert micro_batch.position.tolist() == [0, 1, 2, 3, 2]
    assert micro_batch.segments == [(2, 2, 1)]
    assert micro_batch.reply_end.tolist() == [3, 4]
    assert micro_batch.targets.tolist() == []


def test_a_pair_whose_prefix_is_not_shared_is_two_segments():
    micro_batch = pack(pair_examples([([5, 6, 7, 8], [5, 6, 9])]), np.array([0]), share_prefix=False)
    assert micro_batch.tokens.tolist() == [5, 6, 7, 8, 5, 6, 9]
    assert micro_batch.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [sum(segment) for segment in micro_batch.segments] == [4, 3]
    assert micro_batch.reply_end.tolist() == [3, 6]


def test_every_token_of_a_text_but_its_first_is_a_target():
    micro_batch = pack(text_examples([[1, 2, 3], [4], [5, 6]]), np.array([0, 1, 2]))
    assert micro_batch.label_positions.tolist() == [0, 1, 4]
    assert micro_batch.targets.tolist() == [2, 3, 6]


def test_a_label_position_is_the_token_before_one_that_carries_loss():
    answer = Example(np.array([1, 2], np.int32), (np.array([3, 4, 5], np.int32),), (np.array([True, False, True]),))
    micro_batch = pack(Examples.build([answer]), np.array([0]))
    assert (micro_batch.label_positions.tolist(), micro_batch.targets.tolist()) == ([1, 3], [3, 5])
    assert groups.label_counts(Examples.build([answer])).tolist() == [2]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9), data=st.data())
def test_label_counts_of_a_selection_are_the_numbers_of_its_targets(lengths, data):
    draw = np.random.default_rng(sum(lengths))
    texts = [Example(np.zeros(0, np.int32), (np.arange(n, dtype=np.int32),), (draw.random(n) < 0.5,)) for n in lengths]
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1))))
    selected = Examples.build(texts).select(indices)
    micro_batches = [pack(selected, np.array([i])) for i in range(len(selected))]
    assert groups.label_counts(selected).tolist() == [len(micro_batch.targets) for micro_batch in micro_batches]


def test_an_empty_micro_batch_is_one_token_that_nothing_reads():
    micro_batch = pack(text_examples([[1, 2]]), np.array([], np.int64))
    assert len(micro_batch.tokens) == 1 and micro_batch.segments == [(0, 1)]
    assert len(micro_batch.reply_end) == len(micro_batch.targets) == 0


def test_preferences_are_tables_as_wide_as_the_example_of_most_replies():
    examples = ranking_examples([[[1], [2]], [[3], [4], [5]], [[6], [7]]], [[1, 0], [2, 0, 1], [5, 5]])
    for share in (True, False):
        micro_batch = pack(examples, np.array([2, 1]), share)
        assert micro_batch.tokens[micro_batch.reply_end].tolist() == [6, 7, 3, 4, 5]
        assert micro_batch.reply_table.tolist() == [[0, 1, 0], [2, 3, 4]]
        expected = torch.tensor([[5, 5, torch.nan], [2, 0, 1]])
        torch.testing.assert_close(micro_batch.grade, expected, equal_nan=True)
        assert micro_batch.label.tolist() == [1, 1] and micro_batch.margin.tolist() == [0, 0]
    assert pack(examples, np.array([], np.int64)).reply_table.shape == (0, 1)


lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(lengths_lists, st.integers(1, 5), st.integers(50, 120))
def test_a_plan_has_every_example_once_and_equally_many_micro_batches(lengths, world_size, max_tokens):
    lengths = np.array(lengths)
    plan = plan_micro_batches(lengths, lengths + 0.01 * lengths**2, max_tokens, world_size)
    assert len(plan) == world_size and len({len(of_rank) for of_rank in plan}) == 1
    assert sorted(i for of_rank in plan for indices in of_rank for i in indices) == list(range(len(lengths)))
    assert all(lengths[indices].sum() <= max_tokens for of_rank in plan for indices in of_rank)


def hh_like_lengths(n: int) -> np.ndarray:
    """Prefix + two replies of HH-RLHF at max_length 512: mean about 260 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(5.35, 0.6, n), 12, 800).astype(np.int64)


def test_micro_batches_of_4k_tokens_are_over_95_percent_full_on_hh_like_lengths():
    lengths = hh_like_lengths(20_480)
    micro_batches = []
    for start in range(0, len(lengths), 512):
        of_step = lengths[start : start + 512]
        micro_batches += plan_micro_batches(of_step, of_step, 4096, 1)[0]
    assert lengths.sum() / (4096 * len(micro_batches)) > 0.95


def test_ranks_get_equal_work():
    lengths = hh_like_lengths(512)
    costs = lengths + 4e-4 * lengths**2
    plan = plan_micro_batches(lengths, costs, 4096, 8)
    loads = [sum(costs[i] for indices in of_rank for i in indices) for of_rank in plan]
    assert max(loads) / (sum(loads) / 8) < 1.02


def test_micro_batches_are_packed_tight_where_even_filling_would_overflow():
    lengths = np.array([60, 60, 40, 40, 30, 30, 20, 20])  # 300 tokens in 3 micro-batches of 100
    assert micro_batches._fill_evenly(list(range(8)), lengths.tolist(), lengths.tolist(), 100, 3) is None
    plan = plan_micro_batches(lengths, lengths, 100, 1)
    assert sorted(sum(lengths[indices]) for indices in plan[0]) == [100, 100, 100]


def test_every_epoch_shuffles_all_examples_anew_by_the_seed():
    examples = text_examples([[i] * (1 + i % 7) for i in range(50)])
    settings = {"global_batch_size": 8, "max_tokens": 20, "num_train_epochs": 2}
    a, b, other = (make_loader(examples, seed=seed, **settings) for seed in (3, 3, 4))
    assert (a.steps_per_epoch, a.steps) == (7, 14)
    epochs = [np.concatenate([a.indices(s) for s in range(e * 7, e * 7 + 7)]) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0].tolist() != epochs[1].tolist() != sorted(epochs[1])
    assert all((a.indices(s) == b.indices(s)).all() for s in (13, 0, 6, 7))
    assert a.indices(0).tolist() != other.indices(0).tolist()


def test_a_loader_that_starts_at_any_step_gives_the_same_micro_batches():
    examples = text_examples([[i % 5] * (1 + i % 7) for i in range(50)])
    straight, jumped = (make_loader(examples, max_tokens=20, global_batch_size=8) for _ in range(2))
    in_order = [straight.at(s) for s in range(5)]
    for step in (4, 1, 2):
        batches = jumped.at(step)
        tokens = [micro_batch.tokens.tolist() for micro_batch in batches.micro_batches]
        assert tokens == [micro_batch.tokens.tolist() for micro_batch in in_order[step].micro_batches]
        assert batches.num_labels == sum(len(micro_batch.targets) for micro_batch in batches.micro_batches)
        assert batches.num_tokens == sum(map(len, tokens)) and batches.num_examples == 8


def step_of_rank(n: int):
    """(indices of every micro-batch of this rank, examples and tokens of the step)."""
    loader = make_loader(pair_examples(token_pairs(n)), max_tokens=40, attention_cost=0.1, global_batch_size=n)
    batches = loader.at(0)
    indices = [micro_batch.example_indices.tolist() for micro_batch in batches.micro_batches]
    return indices, batches.num_examples, batches.num_tokens


@pytest.mark.parametrize(("n", "world_size"), [(13, 2), (3, 4)])
def test_ranks_share_a_step_without_overlap_and_know_its_global_counts(n, world_size):
    ranks = run_ranks(world_size, step_of_rank, n)
    assert sorted(i for of_rank, *_ in ranks for indices in of_rank for i in indices) == list(range(n))
    assert len({(len(of_rank), examples, tokens) for of_rank, examples, tokens in ranks}) == 1


def test_an_evaluation_takes_every_example_once():
    examples = pair_examples(token_pairs(30))
    micro_batches = list(EvalBatches(examples, PackingSettings(max_tokens=50)))
    assert sorted(np.concatenate([one.example_indices for one in micro_batches])) == list(range(30))
    assert sum(len(one.tokens) for one in micro_batches) == examples.lengths.sum()


def full_texts(examples: Examples) -> list[list[int]]:
    return [[*one.prefix, *reply] for one in examples for reply in one.replies]


@given(seed=st.integers(0, 1000), max_tokens=st.integers(1, 40), share=st.booleans())
def test_each_distinct_text_is_scored_once_in_parts_that_fit(seed, max_tokens, share):
    packing, seen, computed = PackingSettings(max_tokens=max_tokens, share_prefix=share), {}, []
    some, others = made.token_rankings(5, seed), made.token_rankings(4, seed + 1)
    for rankings, grades in (some, others, [both[:2] * 2 for both in some]):  # the last ones are all known
        examples = ranking_examples(rankings, grades)
        new, index = new_texts(examples, packing, seen)
        computed += full_texts(new)
        assert [computed[i] for i in index] == full_texts(examples)
        fit = groups.packed_lengths(new, share) <= max_tokens
        assert (fit | (np.diff(new.reply_offsets) == 1)).all()
    assert len(computed) == len({*map(tuple, computed)}) and not len(new)


def test_examples_that_are_new_and_fit_are_not_copied():
    examples = pair_examples([([1, 2], [1, 3]), ([4], [5])])
    new, index = new_texts(examples, PackingSettings(), {})
    assert new is examples and index.tolist() == [0, 1, 2, 3]
    parts, _ = new_texts(examples, PackingSettings(max_tokens=2), {})
    assert full_texts(parts) == full_texts(examples) and len(parts) == 3


@given(st.integers(0, 1000))
def test_tokens_counted_by_the_plan_are_the_tokens_packed(seed):
    examples = pair_examples(token_pairs(6, seed))
    for share in (True, False):
        micro_batch = pack(examples, np.arange(6), share)
        packed = len(micro_batch.tokens)
        assert groups.packed_lengths(examples, share).sum() == packed == sum(map(sum, micro_batch.segments))


def test_attention_pairs_are_the_true_entries_of_the_attention_mask():
    examples = pair_examples(token_pairs(4, seed=5))
    for share in (True, False):
        masks = [reference.attention_mask(pack(examples, np.array([i]), share).segments, 0) for i in range(4)]
        assert groups._attention_pairs(examples, share).tolist() == [int(mask.sum()) for mask in masks]


def test_an_example_longer_than_a_micro_batch_is_an_error_with_advice():
    with pytest.raises(ValueError, match=r"--max_tokens 4 is less than the longest example's 6 tokens: raise it"):
        make_loader(text_examples([[1] * 6]), max_tokens=4)


def test_max_steps_overrides_the_epochs():
    assert make_loader(text_examples([[1]] * 9), global_batch_size=4, max_steps=50).steps == 50
    assert make_loader(text_examples([[1]] * 9), global_batch_size=4, num_train_epochs=0.5).steps == 2


def test_moving_a_micro_batch_moves_its_tensors_and_keeps_its_lists():
    micro_batch = pack(pair_examples(token_pairs(2)), np.array([0, 1])).to(torch.device("meta"))
    assert micro_batch.tokens.is_meta and micro_batch.reply_end.is_meta and isinstance(micro_batch.segments, list)
