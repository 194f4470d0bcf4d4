"""rm.losses against plain formulas and autograd."""

import math

import pytest
import torch

from rm import losses
from tests.reference import cross_entropy_sum


def test_bradley_terry_is_minus_log_sigmoid_of_the_difference():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-2.0, 3.0]])
    expected = [-math.log(1 / (1 + math.exp(-d))) for d in (1.0, 0.0, -5.0)]
    torch.testing.assert_close(losses.bradley_terry(rewards), torch.tensor(expected))


def test_bradley_terry_stays_finite_far_from_zero():
    loss = losses.bradley_terry(torch.tensor([[-400.0, 400.0], [400.0, -400.0]]))
    assert loss.tolist() == [800.0, 0.0]


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
