"""rm.model.losses against plain formulas and autograd."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm.model import losses
from rm.model.losses import LossSettings
from tests import made
from tests.reference import cross_entropy_sum, preference_loss


def tables(rows: list[list[float]]) -> torch.Tensor:
    """Ragged rows as (N, K), nan where a row is shorter."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (longest - len(row))] for row in rows], dtype=torch.double)


def loss_of(prompts, settings: LossSettings) -> torch.Tensor:
    """`losses.preference` of prompts (rewards, grade, label, margin)."""
    rewards, grade, label, margin = zip(*prompts, strict=True)
    judged = (torch.tensor(x, dtype=torch.double) for x in (label, margin))
    return losses.preference(tables(rewards).nan_to_num(7.0), tables(grade), *judged, settings)


def plain_bradley_terry(rewards: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])


def pairs_with(rewards: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The loss of pairs (N, 2) whose first is the better one."""
    n = len(rewards)
    return losses.preference(rewards, torch.tensor([[1.0, 0.0]] * n), torch.ones(n), torch.zeros(n), settings)


EVERY = [
    LossSettings(),
    LossSettings(loss="plackett_luce"),
    LossSettings(label_smoothing=0.2, center_rewards_coefficient=0.3),
    LossSettings(loss="plackett_luce", center_rewards_coefficient=0.1),
]
numbers = st.floats(-8, 8)
prompts = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.lists(numbers, min_size=k, max_size=k),
        st.lists(st.integers(-2, 2), min_size=k, max_size=k),
        st.sampled_from([1.0, 0.5, 0.8, 0.1]),
        st.sampled_from([0.0, 0.7, 2.0]),
    )
)


@pytest.mark.parametrize("settings", EVERY, ids=str)
@given(made=st.lists(prompts, min_size=1, max_size=5))
def test_preference_losses_are_those_of_loops_over_pairs_and_choices(settings, made):
    expected = torch.stack([preference_loss(*prompt, settings) for prompt in made])
    torch.testing.assert_close(loss_of(made, settings), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_gradients_of_preference_losses_are_right(settings):
    rewards = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grade = tables([[3, 1, 2, 0], [1, 1], [0, 2, 2]])
    label, margin = torch.tensor([1.0, 0.5, 0.7]).double(), torch.tensor([0.5, 0.0, 1.0]).double()
    assert torch.autograd.gradcheck(lambda r: losses.preference(r, grade, label, margin, settings), rewards)


def test_pairs_are_the_plain_loss_to_the_last_bit_gradients_included():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(1000, 2, generator=draw) * torch.rand(1000, 1, generator=draw) * 30
    results = []
    for function in (plain_bradley_terry, lambda r: pairs_with(r, LossSettings())):
        leaf = rewards.clone().requires_grad_()
        loss = function(leaf).sum()
        loss.backward()
        results.append((loss, leaf.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_losses_stay_finite_far_from_zero(loss):
    rewards = torch.tensor([[-400.0, 400.0], [400.0, -400.0]], requires_grad=True)
    values = pairs_with(rewards, LossSettings(loss=loss))
    values.sum().backward()
    assert values.tolist() == [800.0, 0.0] and rewards.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@given(rewards=st.lists(numbers, min_size=2, max_size=5))
def test_the_plackett_luce_probabilities_of_all_rankings_sum_to_one(rewards):
    orders = itertools.permutations(range(len(rewards)))
    every = loss_of([(rewards, order, 1.0, 0.0) for order in orders], LossSettings(loss="plackett_luce"))
    assert torch.exp(-every).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("settings", EVERY, ids=str)
@given(made=prompts, draw=st.randoms())
def test_the_order_in_which_replies_are_stored_changes_nothing(settings, made, draw):
    rewards, grade, *rest = made
    order = draw.sample(range(len(grade)), len(grade))
    turned = [rewards[i] for i in order], [grade[i] for i in order], *rest
    torch.testing.assert_close(loss_of([made], settings), loss_of([turned], settings))


@pytest.mark.parametrize(
    ("judged", "settings", "best"),
    [
        (([1, 1], 1.0, 0.0), {}, 0.0),
        (([1, 1], 1.0, 0.0), {"loss": "plackett_luce"}, 0.0),
        (([1, 0], 0.5, 2.0), {}, 0.0),
        (([1, 0], 0.8, 0.0), {}, math.log(4)),
        (([0, 1], 0.8, 0.0), {}, -math.log(4)),
        (([1, 0], 1.0, 0.0), {"label_smoothing": 0.2}, math.log(4)),
    ],
)
def test_the_best_difference_is_none_for_a_tie_and_the_log_odds_for_a_probability(judged, settings, best):
    around = [([best + step, 0.0], *judged) for step in (-0.01, 0.0, 0.01)]
    below, there, above = loss_of(around, LossSettings(**settings)).tolist()
    assert there < below and there < above


def test_agreement_is_the_mean_over_the_pairs_that_are_no_tie():
    def agreement(rewards, grade, label=1.0):
        made = losses.compare(tables([rewards]), tables([grade]), torch.tensor([label]))
        return tuple(x.item() for x in losses.agreement(made))

    assert agreement([2.0, -1.0], [1, 0]) == (1, 3)
    assert agreement([2.0, -1.0], [0, 1]) == agreement([2.0, -1.0], [1, 0], 0.3) == (0, -3)
    assert agreement([2.0, 2.0], [1, 0]) == (0.5, 0)
    assert agreement([2.0, 1.0], [1, 1]) == agreement([2.0, 1.0], [1, 0], 0.5) == (0.5, 0)
    assert agreement([3.0, 3.0, 4.0, 0.0], [2, 1, 1, 1]) == (0.5, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"label_smoothing": math.nan}, "--label_smoothing must be at least 0"),
        ({"label_smoothing": 0.1, "loss": "plackett_luce"}, "--label_smoothing is of pairs"),
        ({"center_rewards_coefficient": -1.0}, "--center_rewards_coefficient must be 0 or more, got -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**wrong).check()


def test_examples_that_a_loss_cannot_learn_from_are_refused():
    alone, pair = made.ranking_examples([[[1]]], [[0]]), made.pair_examples([([1], [2]), ([3], [4])])
    unsure = made.pair_examples([([1], [2]), ([3], [4])])
    unsure.label[1] = 0.7
    luce = LossSettings(loss="plackett_luce")
    for fits in ((pair, luce), (pair, LossSettings()), (unsure, LossSettings())):
        losses.check_fits(*fits)
    with pytest.raises(ValueError, match="record 1 of the data has a single reply; a preference needs two or more"):
        losses.check_fits(alone, LossSettings())
    with pytest.raises(ValueError, match="record 2 of the data has a 'label' or a 'margin'.*use --loss bradley_terry"):
        losses.check_fits(unsure, luce)


@pytest.mark.parametrize("logits_at_once", [1, 40, 10**6])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_chunked_cross_entropy_gives_the_loss_and_gradients_of_full_logits(monkeypatch, logits_at_once, frozen_head):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=torch.double), torch.randn(19, 6, dtype=torch.double)
    targets = torch.randint(19, (11,))
    results = []
    for function in (losses.linear_cross_entropy, cross_entropy_sum):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen_head)
        loss = function(h, w, targets)
        (loss * 0.3).backward()
        results.append((loss.detach().double(), h.grad, torch.zeros(0) if frozen_head else w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_no_labels_is_zero_with_zero_gradients():
    h, w = torch.randn(0, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    loss = losses.linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and w.grad.abs().max() == 0


def test_bfloat16_cross_entropy_sums_in_fp32():
    torch.manual_seed(0)
    h, w, t = torch.randn(300, 32), torch.randn(50, 32) * 0.1, torch.randint(50, (300,))
    low = [x.bfloat16().requires_grad_() for x in (h, w)]
    high = [x.detach().float().requires_grad_() for x in low]
    a, b = losses.linear_cross_entropy(*low, t), cross_entropy_sum(*high, t)
    a.backward()
    b.backward()
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=2e-3, atol=0)
    for x, y in zip(low, high, strict=True):
        assert (x.grad.float() - y.grad).norm() / y.grad.norm() < 0.02


def test_logits_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 190)
    seen = []
    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, *a, **k: (seen.append(x.numel()), amax(x, *a, **k))[1])
    h, w = torch.randn(100, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    losses.linear_cross_entropy(h, w, torch.randint(19, (100,))).backward()
    assert sum(seen) == 1900 and max(seen) <= 190


def test_no_gradient_work_without_gradients(monkeypatch):
    def fail(*_):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(losses, "_add_product", fail)
    h, w = torch.randn(10, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    with torch.no_grad():
        losses.linear_cross_entropy(h, w, torch.randint(19, (10,)))
