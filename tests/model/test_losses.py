"""rm.model.losses: values and gradients against plain formulas and autograd."""

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


def table(rows: list[list[float]]) -> torch.Tensor:
    """Lists of different lengths as one table (N, K), nan where a list is shorter."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (longest - len(row))] for row in rows], dtype=torch.double)


def loss_of(prompts, settings: LossSettings) -> torch.Tensor:
    """`losses.preference_loss` of prompts (rewards, grade, label, margin)."""
    rewards, grade, label, margin = zip(*prompts, strict=True)
    label, margin = (torch.tensor(x, dtype=torch.double) for x in (label, margin))
    # The 7 stands for any finite value: entries without a reply must not count.
    return losses.preference_loss(table(rewards).nan_to_num(7.0), table(grade), label, margin, settings)


def plain_bradley_terry(rewards: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1])


def loss_of_pairs(rewards: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The loss of pairs (N, 2) whose first is the better one."""
    n = len(rewards)
    return losses.preference_loss(rewards, torch.tensor([[1.0, 0.0]] * n), torch.ones(n), torch.zeros(n), settings)


ALL_SETTINGS = [
    LossSettings(),
    LossSettings(loss="plackett_luce"),
    LossSettings(label_smoothing=0.2, center_rewards_coefficient=0.3),
    LossSettings(loss="plackett_luce", center_rewards_coefficient=0.1),
]
rewards_strategy = st.floats(-8, 8)
prompts_strategy = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.lists(rewards_strategy, min_size=k, max_size=k),
        st.lists(st.integers(-2, 2), min_size=k, max_size=k),
        st.sampled_from([1.0, 0.5, 0.8, 0.1]),
        st.sampled_from([0.0, 0.7, 2.0]),
    )
)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@given(prompts=st.lists(prompts_strategy, min_size=1, max_size=5))
def test_preference_losses_are_those_of_loops_over_pairs_and_choices(settings, prompts):
    expected = torch.stack([preference_loss(*prompt, settings) for prompt in prompts])
    torch.testing.assert_close(loss_of(prompts, settings), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_gradients_of_preference_losses_pass_gradcheck(settings):
    rewards = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grade = table([[3, 1, 2, 0], [1, 1], [0, 2, 2]])
    label, margin = torch.tensor([1.0, 0.5, 0.7]).double(), torch.tensor([0.5, 0.0, 1.0]).double()
    assert torch.autograd.gradcheck(lambda r: losses.preference_loss(r, grade, label, margin, settings), rewards)


def test_loss_and_gradients_of_pairs_are_bit_identical_to_the_plain_formula():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(1000, 2, generator=draw) * torch.rand(1000, 1, generator=draw) * 30
    results = []
    for function in (plain_bradley_terry, lambda r: loss_of_pairs(r, LossSettings())):
        leaf = rewards.clone().requires_grad_()
        loss = function(leaf).sum()
        loss.backward()
        results.append((loss, leaf.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_preference_losses_stay_finite_far_from_zero(loss):
    rewards = torch.tensor([[-400.0, 400.0], [400.0, -400.0]], requires_grad=True)
    values = loss_of_pairs(rewards, LossSettings(loss=loss))
    values.sum().backward()
    assert values.tolist() == [800.0, 0.0] and rewards.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@given(rewards=st.lists(rewards_strategy, min_size=2, max_size=5))
def test_the_plackett_luce_probabilities_of_all_rankings_sum_to_one(rewards):
    orders = itertools.permutations(range(len(rewards)))
    every = loss_of([(rewards, order, 1.0, 0.0) for order in orders], LossSettings(loss="plackett_luce"))
    assert torch.exp(-every).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@given(prompt=prompts_strategy, random=st.randoms())
def test_preference_losses_do_not_depend_on_the_order_of_replies(settings, prompt, random):
    rewards, grade, *rest = prompt
    order = random.sample(range(len(grade)), len(grade))
    reordered = [rewards[i] for i in order], [grade[i] for i in order], *rest
    torch.testing.assert_close(loss_of([prompt], settings), loss_of([reordered], settings))


@pytest.mark.parametrize(
    ("labels", "settings", "best"),
    [
        (([1, 1], 1.0, 0.0), {}, 0.0),
        (([1, 1], 1.0, 0.0), {"loss": "plackett_luce"}, 0.0),
        (([1, 0], 0.5, 2.0), {}, 0.0),
        (([1, 0], 0.8, 0.0), {}, math.log(4)),
        (([0, 1], 0.8, 0.0), {}, -math.log(4)),
        (([1, 0], 1.0, 0.0), {"label_smoothing": 0.2}, math.log(4)),
    ],
)
def test_the_best_difference_is_zero_for_a_tie_and_the_log_odds_of_a_label(labels, settings, best):
    around = [([best + step, 0.0], *labels) for step in (-0.01, 0.0, 0.01)]
    below, at_best, above = loss_of(around, LossSettings(**settings)).tolist()
    assert at_best < below and at_best < above


def test_agreement_is_the_mean_over_the_pairs_that_are_no_ties():
    def agreement(rewards, grade, label=1.0):
        pairs = losses.pairs_of(table([rewards]), table([grade]), torch.tensor([label]))
        return tuple(x.item() for x in losses.agreement(pairs))

    assert agreement([2.0, -1.0], [1, 0]) == (1, 3)
    assert agreement([2.0, -1.0], [0, 1]) == agreement([2.0, -1.0], [1, 0], 0.3) == (0, -3)
    assert agreement([2.0, 2.0], [1, 0]) == (0.5, 0)
    assert agreement([2.0, 1.0], [1, 1]) == agreement([2.0, 1.0], [1, 0], 0.5) == (0.5, 0)
    assert agreement([3.0, 3.0, 4.0, 0.0], [2, 1, 1, 1]) == (0.5, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"label_smoothing": math.nan}, "--label_smoothing must be a finite number, got nan"),
        (
            {"label_smoothing": 0.1, "loss": "plackett_luce"},
            "--label_smoothing is only defined for --loss bradley_terry",
        ),
        ({"center_rewards_coefficient": -1.0}, "--center_rewards_coefficient must not be negative, got -1.0"),
    ],
)
def test_loss_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**wrong)


def test_check_fits_refuses_examples_that_the_loss_cannot_use():
    single, pair = made.ranking_examples([[[1]]], [[0]]), made.pair_examples([([1], [2]), ([3], [4])])
    labelled = made.pair_examples([([1], [2]), ([3], [4])])
    labelled.label[1] = 0.7
    luce = LossSettings(loss="plackett_luce")
    for fits in ((pair, luce), (pair, LossSettings()), (labelled, LossSettings())):
        losses.check_fits(*fits)
    with pytest.raises(ValueError, match="record 1 of the data has a single reply; a preference needs two or more"):
        losses.check_fits(single, LossSettings())
    with pytest.raises(ValueError, match="record 2 of the data has a 'label' or a 'margin'.*use --loss bradley_terry"):
        losses.check_fits(labelled, luce)


@pytest.mark.parametrize("logits_at_once", [1, 40, 10**6])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (0.25, 1.5)])
def test_chunked_cross_entropy_gives_the_loss_and_gradients_of_full_logits(
    monkeypatch, logits_at_once, frozen_head, scale, softcap
):
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", logits_at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=torch.double), torch.randn(19, 6, dtype=torch.double)
    targets = torch.randint(19, (11,))
    results = []
    for function in (losses.linear_cross_entropy, cross_entropy_sum):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen_head)
        loss = function(h, w, targets, scale, softcap)
        (loss * 0.3).backward()
        results.append((loss.detach().double(), h.grad, torch.zeros(0) if frozen_head else w.grad))
    for chunked, full in zip(*results, strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits_at_once", [1, 40, 10**6])
def test_chunked_cross_entropy_and_hits_are_those_of_full_logits(monkeypatch, logits_at_once):
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", logits_at_once)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, 6), torch.randn(19, 6), torch.randint(19, (300,))
    loss, hits = losses.cross_entropy_and_hits(hidden, weight, targets)
    torch.testing.assert_close(loss, cross_entropy_sum(hidden, weight, targets))
    assert 0 < hits == ((hidden @ weight.T).argmax(1) == targets).sum()
    assert losses.cross_entropy_and_hits(hidden[:0], weight, targets[:0]) == (0, 0)


def test_cross_entropy_of_no_labels_is_zero_with_zero_gradients():
    h, w = torch.randn(0, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    loss = losses.linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and w.grad.abs().max() == 0


def test_cross_entropy_in_bfloat16_sums_in_fp32():
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


def test_cross_entropy_never_holds_all_logits(monkeypatch):
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", 190)
    sizes = []
    amax = torch.Tensor.amax

    def recording_amax(logits, *args, **kwargs):
        sizes.append(logits.numel())
        return amax(logits, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "amax", recording_amax)
    h, w = torch.randn(100, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    losses.linear_cross_entropy(h, w, torch.randint(19, (100,))).backward()
    assert sum(sizes) == 1900 and max(sizes) <= 190


def test_cross_entropy_computes_no_gradient_under_no_grad(monkeypatch):
    def fail(*_):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(losses, "_add_product", fail)
    h, w = torch.randn(10, 6, requires_grad=True), torch.randn(19, 6, requires_grad=True)
    with torch.no_grad():
        losses.linear_cross_entropy(h, w, torch.randint(19, (10,)))
