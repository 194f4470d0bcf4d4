"""rm.data.batch: what a row holds, and who computes what when."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm.data import batch
from rm.data.batch import BatchSettings, EvalBatches, Loader, PackingSettings, pack, plan_micro_batches
from rm.data.examples import Example, Examples
from tests.made import pair_examples, ranking_examples, text_examples, token_pairs
from tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Settings(BatchSettings, PackingSettings):
    pass


def test_a_shared_pair_lies_as_prefix_chosen_rejected_with_positions_that_continue_the_prefix():
    row = pack(pair_examples([([5, 6, 7, 8], [5, 6, 9])]), np.array([0]))
    assert row.tokens.tolist() == [5, 6, 7, 8, 9]
    assert row.position.tolist() == [0, 1, 2, 3, 2]
    assert row.segments == [(2, 2, 1)]
    assert row.last.tolist() == [3, 4]
    assert row.targets.tolist() == []


def test_an_unshared_pair_lies_as_two_documents():
    row = pack(pair_examples([([5, 6, 7, 8], [5, 6, 9])]), np.array([0]), share_prefix=False)
    assert row.tokens.tolist() == [5, 6, 7, 8, 5, 6, 9]
    assert row.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [sum(d) for d in row.segments] == [4, 3]
    assert row.last.tolist() == [3, 6]


def test_every_token_of_a_text_but_its_first_is_a_target_and_none_crosses_a_text():
    row = pack(text_examples([[1, 2, 3], [4], [5, 6]]), np.array([0, 1, 2]))
    assert row.label_positions.tolist() == [0, 1, 4]
    assert row.targets.tolist() == [2, 3, 6]


def test_loss_only_where_the_example_says_so_counts_from_the_token_before():
    answer = Example(np.array([1, 2], np.int32), (np.array([3, 4, 5], np.int32),), (np.array([True, False, True]),))
    row = pack(Examples.build([answer]), np.array([0]))
    assert (row.label_positions.tolist(), row.targets.tolist()) == ([1, 3], [3, 5])
    assert batch._labels(Examples.build([answer])).tolist() == [2]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9), data=st.data())
def test_labels_of_a_selection_are_its_rows_targets(lengths, data):
    draw = np.random.default_rng(sum(lengths))
    texts = [Example(np.zeros(0, np.int32), (np.arange(n, dtype=np.int32),), (draw.random(n) < 0.5,)) for n in lengths]
    numbers = np.array(sorted(data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1))))
    selected = Examples.build(texts).select(numbers)
    rows = [pack(selected, np.array([i])) for i in range(len(selected))]
    assert batch._labels(selected).tolist() == [len(row.targets) for row in rows]


def test_an_empty_row_is_one_token_that_nobody_reads():
    row = pack(text_examples([[1, 2]]), np.array([], np.int64))
    assert len(row.tokens) == 1 and len(row.last) == len(row.targets) == 0 and row.segments == [(0, 1)]


def test_judgements_lie_in_tables_with_room_for_the_example_of_most_replies():
    examples = ranking_examples([[[1], [2]], [[3], [4], [5]], [[6], [7]]], [[1, 0], [2, 0, 1], [5, 5]])
    for share in (True, False):
        row = pack(examples, np.array([2, 1]), share)
        assert row.tokens[row.last].tolist() == [6, 7, 3, 4, 5]
        assert row.replies.tolist() == [[0, 1, 0], [2, 3, 4]]
        torch.testing.assert_close(row.grade, torch.tensor([[5, 5, torch.nan], [2, 0, 1]]), equal_nan=True)
        assert row.label.tolist() == [1, 1] and row.margin.tolist() == [0, 0]
    assert pack(examples, np.array([], np.int64)).replies.shape == (0, 1)


lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(lengths_lists, st.integers(1, 5), st.integers(50, 120))
def test_a_plan_takes_every_example_once_in_rows_that_fit_as_many_on_every_rank(lengths, world, max_tokens):
    lengths = np.array(lengths)
    made = plan_micro_batches(lengths, lengths + 0.01 * lengths**2, max_tokens, world)
    assert len(made) == world and len({len(rows) for rows in made}) == 1
    assert sorted(i for rows in made for row in rows for i in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= max_tokens for rows in made for row in rows)


def hh_like_lengths(n: int) -> np.ndarray:
    """Prefix + two replies of HH-RLHF at max_length 512: mean about 260 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(5.35, 0.6, n), 12, 800).astype(np.int64)


def test_rows_of_4k_tokens_are_over_95_percent_full_on_hh_like_lengths():
    lengths = hh_like_lengths(20_480)
    rows = [
        row for s in range(0, len(lengths), 512) for row in plan_micro_batches(*[lengths[s : s + 512]] * 2, 4096, 1)[0]
    ]
    assert lengths.sum() / (4096 * len(rows)) > 0.95


def test_ranks_get_equal_work():
    lengths = hh_like_lengths(512)
    costs = lengths + 4e-4 * lengths**2
    made = plan_micro_batches(lengths, costs, 4096, 8)
    loads = [sum(costs[i] for row in rows for i in row) for rows in made]
    assert max(loads) / (sum(loads) / 8) < 1.02


def test_rows_are_packed_tight_where_even_rows_would_overflow():
    lengths = np.array([60, 60, 40, 40, 30, 30, 20, 20])  # 300 tokens in 3 rows of 100: even filling overflows
    assert batch._even(list(range(8)), lengths.tolist(), lengths.tolist(), 100, 3) is None
    assert sorted(sum(lengths[row]) for row in plan_micro_batches(lengths, lengths, 100, 1)[0]) == [100, 100, 100]


def test_epochs_shuffle_anew_and_cover_all_examples_and_depend_on_the_seed():
    examples = text_examples([[i] * (1 + i % 7) for i in range(50)])
    settings = Settings(global_batch_size=8, max_tokens=20, num_train_epochs=2)
    a, b, other = (Loader(examples, settings, seed, 0.0) for seed in (3, 3, 4))
    assert (a.steps_per_epoch, a.steps) == (7, 14)
    epochs = [np.concatenate([a.numbers(s) for s in range(e * 7, e * 7 + 7)]) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0].tolist() != epochs[1].tolist() != sorted(epochs[1])
    assert all((a.numbers(s) == b.numbers(s)).all() for s in (13, 0, 6, 7))
    assert a.numbers(0).tolist() != other.numbers(0).tolist()


def test_the_loader_starts_at_any_step():
    examples = text_examples([[i % 5] * (1 + i % 7) for i in range(50)])
    settings = Settings(global_batch_size=8, max_tokens=20)
    straight, jumped = Loader(examples, settings, 0, 0.0), Loader(examples, settings, 0, 0.0)
    works = [straight.at(s) for s in range(5)]
    for step in (4, 1, 2):
        work = jumped.at(step)
        assert [r.tokens.tolist() for r in work.rows] == [r.tokens.tolist() for r in works[step].rows]
        assert work.labels == sum(len(r.targets) for r in work.rows)
        assert work.tokens == sum(len(r.tokens) for r in work.rows) and work.examples == 8


def work_of_rank(n: int):
    loader = Loader(pair_examples(token_pairs(n)), Settings(global_batch_size=n, max_tokens=40), 0, 0.1)
    work = loader.at(0)
    return [row.examples.tolist() for row in work.rows], work.examples, work.tokens


@pytest.mark.parametrize(("n", "world"), [(13, 2), (3, 4)])
def test_ranks_share_a_step_without_overlap_and_know_its_global_counts(n, world):
    ranks = run_ranks(world, work_of_rank, n)
    assert sorted(i for rows, *_ in ranks for row in rows for i in row) == list(range(n))
    assert len({(len(rows), examples, tokens) for rows, examples, tokens in ranks}) == 1


def test_a_pass_in_order_takes_every_example_once():
    examples = pair_examples(token_pairs(30))
    rows = EvalBatches(examples, PackingSettings(max_tokens=50))
    assert sorted(np.concatenate([row.examples for row in rows])) == list(range(30))
    assert sum(len(row.tokens) for row in rows) == examples.lengths.sum()


@given(st.integers(0, 1000))
def test_tokens_counted_by_the_plan_are_the_tokens_packed(seed):
    examples = pair_examples(token_pairs(6, seed))
    for share in (True, False):
        row = pack(examples, np.arange(6), share)
        assert batch._lengths(examples, share).sum() == len(row.tokens) == sum(map(sum, row.segments))


def test_sights_are_the_pairs_that_the_rule_of_sight_lets_see():
    from tests.reference import sight

    examples = pair_examples(token_pairs(4, seed=5))
    for share in (True, False):
        rows = [pack(examples, np.array([i]), share) for i in range(4)]
        assert batch._attention_pairs(examples, share).tolist() == [int(sight(r.segments, 0).sum()) for r in rows]


def test_an_example_longer_than_a_row_is_an_error_that_says_what_to_raise():
    with pytest.raises(ValueError, match=r"--max_tokens 4 is less than the longest example's 6 tokens: raise it"):
        Loader(text_examples([[1] * 6]), Settings(max_tokens=4), 0, 0.0)


def test_max_steps_overrides_the_epochs():
    assert Loader(text_examples([[1]] * 9), Settings(global_batch_size=4, max_steps=50), 0, 0.0).steps == 50
    assert Loader(text_examples([[1]] * 9), Settings(global_batch_size=4, num_train_epochs=0.5), 0, 0.0).steps == 2


def test_tensors_move_and_lists_stay():
    row = pack(pair_examples(token_pairs(2)), np.array([0, 1])).to(torch.device("meta"))
    assert row.tokens.is_meta and row.last.is_meta and isinstance(row.segments, list)
