"""rm.training.optim: the learning rate as a function of the step, and what AdamW is given."""

import pytest
import torch
import transformers

from rm.training import optim
from rm.training.optim import OptimSettings, adamw, learning_rate, round_stochastically, set_learning_rate


def rates(steps=10, **kw):
    settings = OptimSettings(learning_rate=1.0, **kw)
    return [learning_rate(step, steps, settings) for step in range(steps)]


def test_warmup_rises_in_equal_steps_and_never_trains_at_zero():
    assert rates(warmup_ratio=0.4, lr_scheduler_type="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_falls_from_the_peak_to_nearly_zero(kind):
    found = rates(warmup_ratio=0.0, lr_scheduler_type=kind)
    assert found[0] == 1.0 and 0 < found[-1] < 0.11 and sorted(found, reverse=True) == found


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25, 0.95])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_equal_those_of_transformers_over_a_whole_run(kind, warmup_ratio):
    """With W steps of warmup, step s of transformers has the rate s / W, so that step 0 trains at a rate of zero. Ours
    has (s + 1) / W: during warmup it is one step ahead. Both decay from the peak in step W.
    """
    steps = 20
    warmup = round(warmup_ratio * steps)
    schedule = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule[kind](optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(steps, warmup_ratio=warmup_ratio, lr_scheduler_type=kind)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_that_end_above_zero_equal_those_of_transformers_and_torch(kind):
    steps, warmup, lowest = 20, 5, 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if kind == "cosine":
        scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=lowest
        )
    else:
        schedulers = torch.optim.lr_scheduler
        rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
        fall = schedulers.LinearLR(optimizer, 1.0, lowest, total_iters=steps - warmup)
        scheduler = schedulers.SequentialLR(optimizer, [rise, fall], [warmup])
    theirs = []
    for _ in range(steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(steps, warmup_ratio=warmup / steps, lr_scheduler_type=kind, min_lr_ratio=lowest)
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert learning_rate(steps, steps, OptimSettings(learning_rate=2.0, min_lr_ratio=0.1)) == pytest.approx(0.2)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].requires_grad_(False)
    decayed, others = adamw(model, OptimSettings(weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(3,)] * 3 and others["weight_decay"] == 0.0


def test_betas_and_epsilon_reach_adamw():
    """A few updates equal the formula of AdamW (arXiv 1711.05101, algorithm 2) with these values."""
    settings = OptimSettings(learning_rate=0.1, adam_beta1=0.6, adam_beta2=0.7, adam_epsilon=0.5)
    layer = torch.nn.Linear(2, 2, bias=False)
    expected, mean, square = layer.weight.detach().double(), 0, 0
    optimizer = adamw(layer, settings)
    for step in range(1, 4):
        gradient = torch.full((2, 2), 0.3 * step)
        layer.weight.grad = gradient
        optimizer.step()
        mean, square = 0.6 * mean + 0.4 * gradient.double(), 0.7 * square + 0.3 * gradient.double() ** 2
        expected = expected - 0.1 * (mean / (1 - 0.6**step)) / ((square / (1 - 0.7**step)).sqrt() + 0.5)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


SHORT = dict(learning_rate=0.1, weight_decay=0.1, optimizer_state_dtype="bfloat16")


def test_short_states_change_only_what_is_kept_of_the_moments_between_steps(monkeypatch):
    """The twin, in float64: AdamW's formula from moments as they are kept; those have one of the two neighbours."""
    monkeypatch.setattr(optim, "AT_ONCE", 8)  # the matrix is updated in parts
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 5)
    optimizer = adamw(layer, OptimSettings(**SHORT))
    for step in range(1, 6):
        for p in layer.parameters():
            p.grad = torch.randn(p.shape)
        old = {p: (p.detach().double(), *(optimizer.state[p].get(k, 0) for k in MOMENTS)) for p in layer.parameters()}
        old = {p: [x.double().clone() if torch.is_tensor(x) else x for x in values] for p, values in old.items()}
        optimizer.step()
        for p, (weight, mean, square) in old.items():
            mean, square = 0.9 * mean + 0.1 * p.grad.double(), 0.999 * square + 0.001 * p.grad.double() ** 2
            update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            decay = 0.1 if p.ndim > 1 else 0.0
            torch.testing.assert_close(p.double(), weight * (1 - 0.1 * decay) - 0.1 * update, rtol=1e-5, atol=1e-6)
            kept_mean, kept_square = (optimizer.state[p][kind] for kind in MOMENTS)
            assert kept_mean.dtype == kept_square.dtype == torch.bfloat16
            torch.testing.assert_close(kept_mean.double(), mean, rtol=2**-8, atol=0)  # half of a last place
            torch.testing.assert_close(kept_square.double(), square, rtol=2**-7, atol=0)
            assert optimizer.state[p]["step"] == step


MOMENTS = ("exp_avg", "exp_avg_sq")


def test_rounding_is_right_on_average_repeats_and_leaves_what_bfloat16_holds():
    x = torch.full((100, 100), 1 + 0.3 / 128)  # 0.3 of the way from 1 to the next bfloat16
    rounded = [round_stochastically(x, 0, torch.tensor(float(step))) for step in range(1, 101)]
    assert {value.item() for value in rounded[0].unique()} == {1.0, 1 + 1 / 128}
    ups = torch.stack([r > 1 for r in rounded]).double()
    assert ups.mean().item() == pytest.approx(0.3, abs=0.002)  # of a million: four standard deviations
    # Neither a step nor a value is rounded up more often than chance would have it (binomial, five deviations).
    assert (ups.mean((1, 2)) - 0.3).abs().max() < 5 * (0.21 / 10**4) ** 0.5
    assert (ups.mean(0) - 0.3).abs().max() < 5 * (0.21 / 100) ** 0.5
    assert not torch.equal(round_stochastically(x, 1, torch.tensor(1.0)), rounded[0])
    assert torch.equal(round_stochastically(x, 0, torch.tensor(1.0)), rounded[0])
    exact = torch.randn(100).bfloat16().float()
    assert torch.equal(round_stochastically(exact, 0, torch.tensor(1.0)), exact)


def test_a_mean_of_squares_in_bfloat16_still_falls():
    """Rounded to the nearest, it never would: beta2 changes it by less than half of its last place."""
    layer = torch.nn.Linear(100, 100, bias=False)
    optimizer = adamw(layer, OptimSettings(**SHORT))
    for step in range(500):
        layer.weight.grad = torch.full((100, 100), 1.0 if step == 0 else 0.0)
        optimizer.step()
    mean = optimizer.state[layer.weight]["exp_avg_sq"].double().mean().item()
    assert mean == pytest.approx(0.001 * 0.999**499, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate must be positive, got 0.0"),
        ({"warmup_ratio": 1.5}, "from 0 to 1, got 1.5"),
        ({"min_lr_ratio": 1.5}, "--min_lr_ratio is a share of --learning_rate, from 0 to 1, got 1.5"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must not be negative"),
        ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and below 1, got 1.0"),
        ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0 and below 1, got -0.1"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon must be positive, got 0.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimSettings(**wrong)


def test_an_adapters_b_may_learn_faster_than_its_a():
    layer = torch.nn.Module()
    layer.lora_A, layer.lora_B = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in "AB")
    optimizer = adamw(torch.nn.ModuleDict({"q_proj": layer}), OptimSettings(loraplus_lr_ratio=16.0))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert (rates[id(layer.lora_A)], rates[id(layer.lora_B)]) == (1e-3, 16e-3)
