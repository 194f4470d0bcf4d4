"""train_step of the scripts: any number of ranks, and any split into micro-batches, give the update of one slow
process; a step that is not finite updates nothing.
"""

import dataclasses
import functools
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import train_rm
import train_sft
from rm.config import compose, updated
from rm.data import batch
from rm.data.batch import EvalBatches, Loader
from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.model import lisa
from rm.model.heads import LanguageModel, RewardModel
from rm.model.losses import LossSettings
from rm.plan import memory
from rm.scoring import score
from rm.training import optim
from rm.training.evaluate import evaluate
from rm.training.run_log import RunLog, RunSettings
from tests import made, reference, training_runs
from tests.ranks import run_ranks
from tests.training_runs import ATTENTION_COST, Settings, examples_of, sharded

STEPS = 4
SETTINGS = compose(
    Settings,
    global_batch_size=7, max_tokens=45, learning_rate=1e-2, max_grad_norm=1.0, weight_decay=0.1, num_train_epochs=3,
)  # fmt: skip


def loader_of(examples, settings: Settings) -> Loader:
    return Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=ATTENTION_COST)


def test_train_step_is_the_same_text_in_both_scripts():
    assert inspect.getsource(train_rm.train_step) == inspect.getsource(train_sft.train_step)


def train(cls, config, settings: Settings, examples, loss: LossSettings | None = None):
    """(mean loss, gradient norm) of every step, and the weights at the end."""
    plain = made.model(cls, config)
    if loss is not None:
        plain.loss = loss
    model = sharded(plain, settings.parallel)
    loader = loader_of(examples, settings)
    optimizer = optim.adamw(model, settings.optim)
    lines = []
    for s in range(STEPS):
        batches = loader.at(s)
        sums, grad_norm = train_rm.train_step(model, optimizer, batches, settings.optim.max_grad_norm)
        loss, count = dist.sum_over_ranks(torch.stack([sums["loss"].double(), sums["count"].double()])).tolist()
        lines.append((loss / count, grad_norm.item()))
        assert count == model.count(batches)
    return lines, [sharding.full_tensor(p) for p in model.parameters()]


def train_slowly(cls, config, settings: Settings, examples, mean_loss):
    """The same without micro-batches, ranks, packing or shared prefixes: one `mean_loss(model, indices)` a step."""
    model = made.model(cls, config)
    loader = loader_of(examples, settings)
    optimizer = optim.adamw(model, settings.optim)
    lines = []
    for s in range(STEPS):
        loss = mean_loss(model, loader.indices(s))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lines.append((loss.item(), norm.item()))
    return lines, [p.detach() for p in model.parameters()]


def mean_pair_loss(model, indices):
    pairs = made.token_pairs(16, seed=1)
    return reference.pair_loss_sum(model, [pairs[i] for i in indices]) / len(indices)


def mean_text_loss(model, indices):
    pairs = made.token_pairs(16, seed=1)
    texts = [pairs[i][0] for i in indices]
    return reference.text_loss_sum(model, texts) / sum(len(t) - 1 for t in texts)


@functools.cache
def slow_training(cls, family: str):
    mean_loss = mean_pair_loss if cls is RewardModel else mean_text_loss
    return train_slowly(cls, made.CONFIGS[family], SETTINGS, examples_of(cls, 16), mean_loss)


@pytest.mark.parametrize(
    ("cls", "family", "world_size", "group_size"),
    [
        (RewardModel, "llama", 1, None),
        (RewardModel, "llama", 4, None),
        (RewardModel, "gpt_neo", 1, None),
        (RewardModel, "gpt_neo", 4, 2),
        (LanguageModel, "llama", 1, None),
        (LanguageModel, "llama", 4, 2),
        (LanguageModel, "gpt_neo", 1, None),
        (LanguageModel, "gpt_neo", 2, None),
    ],
)
def test_ranks_groups_and_packing_do_not_change_the_training(cls, family, world_size, group_size):
    # 16 examples: two steps of 7 (several ragged micro-batches a rank) and one of 2, where two of 4 ranks have none
    settings = updated(SETTINGS, shard_group_size=group_size)
    results = run_ranks(world_size, train, cls, made.CONFIGS[family], settings, examples_of(cls, 16))
    assert_same_training(results, slow_training(cls, family))


@pytest.mark.parametrize(("world_size", "group_size"), [(2, None), (4, 2)])
def test_gradients_that_wait_for_the_last_micro_batch_do_not_change_the_training(world_size, group_size):
    settings = updated(SETTINGS, sync_each_batch=False, shard_group_size=group_size)
    results = run_ranks(world_size, train, RewardModel, made.LLAMA, settings, examples_of(RewardModel, 16))
    assert_same_training(results, slow_training(RewardModel, "llama"))


def lisa_both_ways() -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of every step of LISA in bfloat16: gradients reduced in each micro-batch, and once a step.

    Each step trains another layer, so that gradients that were left over would show.
    """
    results = []
    for sync in (True, False):
        settings = updated(
            SETTINGS, dtype="bfloat16", sync_each_batch=sync, use_lisa=True, lisa_activated_layers=1,
            lisa_interval_steps=1,
        )  # fmt: skip
        model = sharded(made.model(RewardModel), settings.parallel)
        loader, optimizer = loader_of(examples_of(RewardModel, 16), settings), optim.adamw(model, settings.optim)
        lines = []
        for step in range(STEPS):
            lisa.activate_layers(model, optimizer, step, settings.lisa, seed=0)
            lines.append(training_runs.run_step(model, optimizer, loader.at(step)))
        results.append(lines)
    return results


def test_gradients_of_lisa_in_bfloat16_are_the_same_where_they_wait():
    each, once = run_ranks(2, lisa_both_ways)[0]
    torch.testing.assert_close(torch.tensor(once), torch.tensor(each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "world_size"), [("bradley_terry", 1), ("plackett_luce", 1), ("plackett_luce", 4)])
def test_ranks_and_packing_do_not_change_the_training_on_rankings(loss, world_size):
    rankings, grades = made.token_rankings(16, seed=1)
    assert {len(grade) for grade in grades} == {2, 3, 4, 5}
    examples, loss = made.ranking_examples(rankings, grades), LossSettings(loss=loss)

    def mean_loss(model, indices):
        of_step = [rankings[i] for i in indices], [grades[i] for i in indices]
        return reference.ranking_loss_sum(model, *of_step, loss).float() / len(indices)

    slow = train_slowly(RewardModel, made.LLAMA, SETTINGS, examples, mean_loss)
    assert_same_training(run_ranks(world_size, train, RewardModel, made.LLAMA, SETTINGS, examples, loss), slow)


def assert_same_training(ranks, slow) -> None:
    slow_lines, slow_weights = slow
    for lines, weights in ranks:
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(slow_lines), rtol=3e-5, atol=1e-5)
        for p, q in zip(weights, slow_weights, strict=True):
            assert (p - q).norm() <= 1e-3 * q.norm()  # Adam amplifies rounding where a gradient is nearly zero


def test_several_micro_batches_a_rank_and_empty_ones_do_occur():
    loader = loader_of(examples_of(RewardModel, 16), SETTINGS)
    assert len(loader.at(0).micro_batches) > 1
    lengths = loader.lengths[loader.indices(2)]
    plan = batch.plan_micro_batches(lengths, lengths, SETTINGS.packing.max_tokens, 4)
    assert [] in [micro_batch for micro_batches in plan for micro_batch in micro_batches]


def lines_of(settings: Settings):
    return train(RewardModel, made.LLAMA, settings, examples_of(RewardModel, 16))[0]


@pytest.mark.apart
def test_gradients_are_exchanged_between_groups_once_a_step():
    with dist.fake_process_group(4):
        model = sharded(made.model(RewardModel), sharding.ParallelSettings(shard_group_size=2))
        batches = loader_of(examples_of(RewardModel, 16), updated(SETTINGS, global_batch_size=16)).at(0)
        optimizer = optim.adamw(model, SETTINGS.optim)
        with memory._Traffic() as traffic:
            train_rm.train_step(model, optimizer, batches, 1.0)
    assert len(batches.micro_batches) > 1
    size = sum(p.numel() for p in model.parameters())
    assert traffic.replicated == pytest.approx(2 * size * 4 / 2, rel=1e-2)  # a ring sends each value twice


def test_bfloat16_computes_nearly_as_float32_and_the_same_on_every_rank():
    exact = run_ranks(1, lines_of, SETTINGS)[0]
    low = run_ranks(2, lines_of, updated(SETTINGS, dtype="bfloat16"))
    assert low[0] == low[1]
    assert exact != low[0]
    torch.testing.assert_close(torch.tensor(low[0][0]), torch.tensor(exact[0]), rtol=0.05, atol=0.02)


def dtypes():
    model = sharded(made.model(RewardModel), sharding.ParallelSettings(dtype="bfloat16"))
    seen = {}
    model.score.register_forward_pre_hook(lambda m, x: seen.update(score=(x[0].dtype, m.weight.dtype)))
    model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, x: seen.update(block=(x[0].dtype, m.weight.dtype)))
    model(batch.pack(examples_of(RewardModel, 2), range(2)))["loss"].backward()
    return seen, {p.dtype for p in model.parameters()}, {p.grad.dtype for p in model.parameters()}


def test_in_bfloat16_score_head_master_weights_and_gradients_are_float32():
    seen, parameters, gradients = run_ranks(1, dtypes)[0]
    assert seen == {"score": (torch.float32, torch.float32), "block": (torch.bfloat16, torch.bfloat16)}
    assert parameters == gradients == {torch.float32}


def infinite_weight(model):
    """Set a value to inf on every rank; the returned function restores it."""
    weight = sharding.local(model.norm.weight)
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:1] = float("inf")

    def restore():
        with torch.no_grad():
            weight.copy_(before)

    return restore


def loss_plus(value: float):
    """Add to the loss of the last rank alone, which leaves its derivative 1."""

    def apply(model):
        if dist.rank() != dist.world_size() - 1:
            return lambda: None
        return model.register_forward_hook(lambda m, x, sums: sums | {"loss": sums["loss"] + value}).remove

    return apply


def infinite_gradient(model):
    """Make a gradient on the last rank alone infinite, behind a finite loss."""

    def hook(module, x, hidden):
        hidden.register_hook(lambda gradient: gradient * float("inf"))

    if dist.rank() != dist.world_size() - 1:
        return lambda: None
    return model.layers[0].register_forward_hook(hook).remove


# what makes a step's loss or gradient not finite: called with the model, it returns a function that undoes it
FAULTS = {
    "nan loss": loss_plus(float("nan")),
    "inf loss": loss_plus(float("inf")),
    "inf gradient": infinite_gradient,
    "inf weight": infinite_weight,
}


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters, Adam moments and step counters."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p
        tensors |= {f"{name} {kind}": value for kind, value in optimizer.state[p].items()}
    return {name: sharding.local(tensor).detach().clone() for name, tensor in tensors.items()}


def steps_with_faults(folder: Path) -> dict[str, dict]:
    """For every fault: its loss on this rank, what its step changed, what the next one changed, and RunLog's error."""
    model = sharded(made.model(RewardModel))
    loader, optimizer = loader_of(examples_of(RewardModel, 16), SETTINGS), optim.adamw(model, SETTINGS.optim)
    assert sharding.is_sharded(model) == (dist.world_size() > 1)
    found = {}
    for name, fault in FAULTS.items():
        settings = RunSettings(output_dir=str(folder / name), logging_steps=100)
        with RunLog(settings, settings, steps=100, steps_per_epoch=3, facts={}) as run:

            def step(number: int):
                sums, norm = train_rm.train_step(model, optimizer, loader.at(number), SETTINGS.optim.max_grad_norm)
                run.log_step(number + 1, sums, norm, 1e-2, loader.at(number), "pairs")  # noqa: B023
                return sums["loss"].item()

            step(0)
            undo = fault(model)
            before = state_of(model, optimizer)
            loss = step(1)
            after = state_of(model, optimizer)
            undo()
            before_next = state_of(model, optimizer)
            next_loss = step(2)
            after_next = state_of(model, optimizer)
            with pytest.raises(ValueError) as error:
                run.collect()
        assert len(before) == 4 * len(list(model.parameters()))  # parameter, two moments, step
        found[name] = {
            "losses": (loss, next_loss),
            "changed": [key for key in before if not torch.equal(before[key], after[key])],
            "changed by the next": [key for key in before if not torch.equal(before_next[key], after_next[key])],
            "all": list(before),
            "error": str(error.value),
        }
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(world_size, tmp_path):
    results = run_ranks(world_size, steps_with_faults, tmp_path)
    for name in FAULTS:
        first, last = results[0][name], results[-1][name]
        finite = [torch.tensor(result[name]["losses"]).isfinite().tolist() for result in results]
        if name in ("nan loss", "inf loss"):  # on the last rank alone
            assert finite == [[True, True]] * (world_size - 1) + [[False, True]]
        elif name == "inf gradient":
            assert finite == [[True, True]] * world_size
        for found in (first, last):
            assert found["changed"] == []
            # A shard may be empty on a rank: all others change again in the next step.
            assert {f"{key} step" for key in found["all"] if " " not in key} <= set(found["changed by the next"])
            assert {"embed.weight", "layers.0.mlp.up_proj.weight exp_avg"} <= set(found["changed by the next"])
            assert found["error"].startswith("step 2: the loss is ")


def evaluated(examples):
    model = sharded(made.model(RewardModel))
    batches = EvalBatches(examples, SETTINGS.packing)
    scores = score.all_rewards(model, batches)  # first: nothing that an evaluation gathered may be needed
    return evaluate(model, {UNNAMED: batches})[UNNAMED], scores


@pytest.mark.parametrize("world_size", [1, 4])
def test_evaluation_is_exact_over_ranks_and_scores_keep_the_order(world_size):
    n = 5
    model = made.model(RewardModel)
    pairs = made.token_pairs(n, seed=1)
    scores = torch.stack([torch.stack([reference.reward_of(model, t) for t in pair]) for pair in pairs]).detach()
    for means, got in run_ranks(world_size, evaluated, made.pair_examples(pairs)):
        torch.testing.assert_close(got.view(-1, 2), scores, rtol=1e-5, atol=1e-5)
        assert means["accuracy"] == (scores[:, 0] > scores[:, 1]).double().mean().item()
        assert means["loss"] == pytest.approx(reference.pair_loss_sum(model, pairs).item() / n, rel=1e-5)


def swapped_around_an_evaluation(settings: Settings) -> tuple[list[float], torch.Tensor, list[tuple[float, float]]]:
    """A changed loop: after each step, evaluate and score with averaged weights (EMA), then train with the own again.

    Returns:
        The losses of the evaluations, the last rewards, and the (loss, gradient norm) of every step.
    """
    examples = examples_of(RewardModel, 16)
    model, loader = sharded(made.model(RewardModel), settings.parallel), loader_of(examples, settings)
    optimizer = optim.adamw(model, settings.optim)
    shards = [sharding.local(p.detach()) for p in model.parameters()]
    average = [shard.clone() for shard in shards]
    held_out = EvalBatches(made.pair_examples(made.token_pairs(5, seed=9)), settings.packing)

    losses, lines = [], []
    for s in range(3):
        lines.append(training_runs.run_step(model, optimizer, loader.at(s)))
        for shard, averaged in zip(shards, average, strict=True):
            averaged.lerp_(shard, 0.5)
        own = [shard.clone() for shard in shards]
        for shard, averaged in zip(shards, average, strict=True):
            shard.copy_(averaged)
        losses.append(evaluate(model, {UNNAMED: held_out})[UNNAMED]["loss"])
        rewards = score.all_rewards(model, held_out)
        for shard, before in zip(shards, own, strict=True):
            shard.copy_(before)
    return losses, rewards, lines


@pytest.mark.parametrize("keep_gathered", [False, True])
def test_weights_swapped_around_an_evaluation_are_those_of_one_process(keep_gathered):
    settings = updated(SETTINGS, reshard_after_forward=not keep_gathered)
    ((losses, rewards, lines),) = run_ranks(1, swapped_around_an_evaluation, settings)
    for got_losses, got_rewards, got_lines in run_ranks(2, swapped_around_an_evaluation, settings):
        torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_rewards, rewards, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(got_lines), torch.tensor(lines), rtol=1e-4, atol=1e-5)


def test_scores_of_rankings_are_in_the_order_of_the_stored_replies():
    rankings, grades = made.token_rankings(6)
    model = made.model(RewardModel)
    alone = torch.stack([reference.reward_of(model, text) for texts in rankings for text in texts]).detach()
    for _, got in run_ranks(2, evaluated, made.ranking_examples(rankings, grades)):
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


def statistics(examples):
    return score.reward_statistics(sharded(made.model(RewardModel)), EvalBatches(examples, SETTINGS.packing))


def test_reward_statistics_are_those_of_best_replies_or_texts():
    model = made.model(RewardModel)
    rankings = [[[1, 2], [1, 3], [1, 4, 5]], [[6, 7], [8]], [[9], [10, 11]]]
    texts = [[1, 4, 5], [6, 7], [9], [10, 11]]  # the best ones, and both of a tie
    alone = torch.stack([reference.reward_of(model, text) for text in texts]).double()
    expected = {"reward_mean": alone.mean().item(), "reward_std": alone.std(correction=0).item()}
    for examples in (made.ranking_examples(rankings, [[0, 1, 2], [3, 1], [5, 5]]), made.text_examples(texts)):
        for got in run_ranks(2, statistics, examples):
            assert got == pytest.approx(expected, rel=1e-5)


def test_reward_statistics_take_the_better_reply_by_the_label():
    examples = made.pair_examples([([1, 2], [1, 3]), ([4, 5], [4, 6]), ([7, 8], [7, 9])])
    examples = dataclasses.replace(examples, label=np.array([0.9, 0.0, 0.5], np.float32))
    better = [[1, 2], [4, 6], [7, 8], [7, 9]]  # a label of 0 turns a pair round, 0.5 is a tie
    alone = torch.stack([reference.reward_of(made.model(RewardModel), text) for text in better]).double()
    (got,) = run_ranks(1, statistics, examples)
    assert got["reward_mean"] == pytest.approx(alone.mean().item(), rel=1e-5)


def largest_micro_batch(global_batch_size: int) -> int:
    loader = loader_of(examples_of(RewardModel, 64), updated(SETTINGS, global_batch_size=global_batch_size))
    return max(len(micro_batch.tokens) for micro_batch in loader.at(0).micro_batches)


def test_a_micro_batch_does_not_grow_with_the_global_batch():
    assert all(largest_micro_batch(size) <= 45 for size in (8, 64))
