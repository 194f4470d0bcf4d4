"""rm.training.optim: the learning rate as a function of the step, and who decays."""

import dataclasses

import pytest
import torch

from rm.training.optim import OptimSettings, adamw, learning_rate, set_learning_rate


def rates(steps=10, **kw):
    settings = OptimSettings(learning_rate=1.0, **kw)
    return [learning_rate(step, steps, settings) for step in range(steps)]


def test_warmup_rises_in_equal_steps_and_never_trains_at_zero():
    assert rates(warmup_ratio=0.4, lr_scheduler_type="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_falls_from_the_peak_to_nearly_zero(kind):
    found = rates(warmup_ratio=0.0, lr_scheduler_type=kind)
    assert found[0] == 1.0 and 0 < found[-1] < 0.11 and sorted(found, reverse=True) == found


def test_linear_decay_is_transformers_own():
    from transformers import get_linear_schedule_with_warmup

    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(made, 0, 10)
    for ours in rates(warmup_ratio=0.0):
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        made.step()
        theirs.step()


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].requires_grad_(False)
    decayed, plain = adamw(model, OptimSettings(weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in plain["params"]] == [(3,)] * 3 and plain["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate must be positive, got 0.0"),
        ({"warmup_ratio": 1.5}, "from 0 to 1, got 1.5"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must not be negative"),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OptimSettings(), **wrong).check()


def test_an_adapters_b_may_learn_faster_than_its_a():
    layer = torch.nn.Module()
    layer.lora_A, layer.lora_B = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in "AB")
    optimizer = adamw(torch.nn.ModuleDict({"q_proj": layer}), OptimSettings(loraplus_lr_ratio=16.0))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert (rates[id(layer.lora_A)], rates[id(layer.lora_B)]) == (1e-3, 16e-3)
