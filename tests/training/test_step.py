"""rm.training.step: one, two and four ranks, any split into rows, give the update of one slow process."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from rm.data import batch
from rm.distributed import sharding
from rm.model.heads import LanguageModel, RewardModel
from rm.model.losses import LossSettings
from rm.scoring import score
from rm.training import optim, step
from tests import made, reference
from tests.ranks import run_ranks

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Settings(batch.BatchSettings, batch.PackingSettings, optim.OptimSettings, sharding.ParallelSettings):
    pass


def examples_of(cls, n: int):
    pairs = made.token_pairs(n, seed=1)
    return made.pair_examples(pairs) if cls is RewardModel else made.text_examples([a for a, _ in pairs])


def sharded(cls, config, settings: Settings):
    """The model of `made.model`, on the meta device, sharded, and filled."""
    whole = made.model(cls, config)
    with torch.device("meta"):
        model = cls(config, whole.kernel)
    sharding.apply(model, settings)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        sharding.fill(p, q.detach())
    return model


def train(cls, config, settings: Settings, examples, loss=None):
    """(mean loss, gradient norm) of every step, and the weights at the end."""
    model = sharded(cls, config, settings)
    model.loss_settings = loss or LossSettings()
    loader = batch.Loader(examples, settings, seed=0, attention_cost=0.01)
    optimizer = optim.adamw(model, settings)
    lines = []
    for s in range(STEPS):
        work = loader.at(s)
        sums = step.train_step(model, optimizer, work, settings.max_grad_norm)
        summed = step.dist.sum_over_ranks(torch.stack([sums["loss"].double(), sums["count"].double()]))
        lines.append(((summed[0] / summed[1]).item(), sums["grad_norm"].item()))
        assert summed[1] == model.count(work)
    return lines, [sharding.full_tensor(p) for p in model.parameters()]


def train_slowly(cls, config, settings: Settings, examples, mean_loss):
    """The same without rows, ranks, packing or sharing: `mean_loss(model, numbers)`, one backward a step."""
    model = made.model(cls, config)
    loader = batch.Loader(examples, settings, seed=0, attention_cost=0.01)
    optimizer = optim.adamw(model, settings)
    lines = []
    for s in range(STEPS):
        loss = mean_loss(model, loader.indices(s))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lines.append((loss.item(), norm.item()))
    return lines, [p.detach() for p in model.parameters()]


def mean_pair_loss(model, numbers):
    pairs = made.token_pairs(16, seed=1)
    return reference.pair_loss_sum(model, [pairs[i] for i in numbers]) / len(numbers)


def mean_text_loss(model, numbers):
    pairs = made.token_pairs(16, seed=1)
    texts = [pairs[i][0] for i in numbers]
    return reference.text_loss_sum(model, texts) / sum(len(t) - 1 for t in texts)


SETTINGS = Settings(
    global_batch_size=7, max_tokens=45, learning_rate=1e-2, max_grad_norm=1.0, weight_decay=0.1, num_train_epochs=3
)


@pytest.mark.parametrize(("world", "group"), [(1, None), (2, None), (4, None), (4, 2)])
@pytest.mark.parametrize("config", made.CONFIGS.values(), ids=made.CONFIGS.keys())
@pytest.mark.parametrize(("cls", "mean_loss"), [(RewardModel, mean_pair_loss), (LanguageModel, mean_text_loss)])
def test_ranks_groups_rows_and_packing_do_not_change_the_training(cls, mean_loss, config, world, group):
    # 16 examples: two steps of 7 (several ragged rows a rank) and one of 2, where of 4 ranks two have no work
    examples = examples_of(cls, 16)
    slow = train_slowly(cls, config, SETTINGS, examples, mean_loss)
    settings = dataclasses.replace(SETTINGS, shard_group_size=group)
    assert_same_training(run_ranks(world, train, cls, config, settings, examples), slow)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_ranks_rows_and_packing_do_not_change_the_training_on_rankings_of_any_length(loss, world):
    rankings, grades = made.token_rankings(16, seed=1)
    assert {len(grade) for grade in grades} == {2, 3, 4, 5}
    examples, loss = made.ranking_examples(rankings, grades), LossSettings(loss=loss)

    def mean_loss(model, numbers):
        mine = [rankings[i] for i in numbers], [grades[i] for i in numbers]
        return reference.ranking_loss_sum(model, *mine, loss).float() / len(numbers)

    slow = train_slowly(RewardModel, made.LLAMA, SETTINGS, examples, mean_loss)
    assert_same_training(run_ranks(world, train, RewardModel, made.LLAMA, SETTINGS, examples, loss), slow)


def assert_same_training(ranks, slow) -> None:
    slow_lines, slow_weights = slow
    for lines, weights in ranks:
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(slow_lines), rtol=3e-5, atol=1e-5)
        for p, q in zip(weights, slow_weights, strict=True):
            assert (p - q).norm() <= 1e-3 * q.norm()  # Adam amplifies rounding where a gradient is nearly zero


def test_several_rows_a_rank_and_spare_rows_really_occur():
    loader = batch.Loader(examples_of(RewardModel, 16), SETTINGS, seed=0, attention_cost=0.01)
    rows = [len(loader.at(s).rows) for s in range(STEPS)]
    assert rows[0] > 1
    lengths = loader.lengths[loader.indices(2)]
    assert [] in [row for rows in batch.plan_micro_batches(lengths, lengths, SETTINGS.max_tokens, 4) for row in rows]


def bfloat16_lines(world_settings: Settings):
    return train(RewardModel, made.LLAMA, world_settings, examples_of(RewardModel, 16))[0]


def test_bfloat16_computes_near_float32_and_keeps_float32_masters():
    exact = run_ranks(1, bfloat16_lines, SETTINGS)[0]
    low = run_ranks(2, bfloat16_lines, dataclasses.replace(SETTINGS, dtype="bfloat16"))
    assert low[0] == low[1]
    assert exact != low[0]
    torch.testing.assert_close(torch.tensor(low[0][0]), torch.tensor(exact[0]), rtol=0.05, atol=0.02)


def dtypes():
    settings = Settings(dtype="bfloat16")
    model = sharded(RewardModel, made.LLAMA, settings)
    seen = {}
    model.score.register_forward_pre_hook(lambda m, x: seen.update(score=(x[0].dtype, m.weight.dtype)))
    model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, x: seen.update(block=(x[0].dtype, m.weight.dtype)))
    row = batch.pack(examples_of(RewardModel, 2), range(2))
    model(row)["loss"].backward()
    return seen, {p.dtype for p in model.parameters()}, {p.grad.dtype for p in model.parameters()}


def test_in_bfloat16_blocks_compute_low_and_the_score_head_and_all_that_is_stored_stay_float32():
    seen, parameters, gradients = run_ranks(1, dtypes)[0]
    assert seen == {"score": (torch.float32, torch.float32), "block": (torch.bfloat16, torch.bfloat16)}
    assert parameters == gradients == {torch.float32}


def evaluated(examples):
    model = sharded(RewardModel, made.LLAMA, SETTINGS)
    rows = batch.EvalBatches(examples, SETTINGS)
    scores = score.all_rewards(model, rows)  # first: nothing that an evaluation gathered may be needed
    return step.evaluate(model, rows), scores


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_is_exact_over_ranks_and_scores_come_in_file_order(world):
    n = 5
    model = made.model(RewardModel)
    pairs = made.token_pairs(n, seed=1)
    scores = torch.stack([torch.stack([reference.reward_of(model, t) for t in pair]) for pair in pairs]).detach()
    for means, got in run_ranks(world, evaluated, made.pair_examples(pairs)):
        torch.testing.assert_close(got.view(-1, 2), scores, rtol=1e-5, atol=1e-5)
        assert means["accuracy"] == (scores[:, 0] > scores[:, 1]).double().mean().item()
        assert means["loss"] == pytest.approx(reference.pair_loss_sum(model, pairs).item() / n, rel=1e-5)


def test_scores_of_rankings_come_in_the_order_of_the_stored_replies():
    rankings, grades = made.token_rankings(6)
    model = made.model(RewardModel)
    alone = torch.stack([reference.reward_of(model, text) for texts in rankings for text in texts]).detach()
    for _, got in run_ranks(2, evaluated, made.ranking_examples(rankings, grades)):
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


def statistics(examples):
    return score.reward_statistics(sharded(RewardModel, made.LLAMA, SETTINGS), batch.EvalBatches(examples, SETTINGS))


def test_reward_statistics_are_those_of_best_replies_or_texts():
    model = made.model(RewardModel)
    rankings = [[[1, 2], [1, 3], [1, 4, 5]], [[6, 7], [8]], [[9], [10, 11]]]
    texts = [[1, 4, 5], [6, 7], [9], [10, 11]]  # the best ones, and both of a tie
    alone = torch.stack([reference.reward_of(model, text) for text in texts]).double()
    expected = {"reward_mean": alone.mean().item(), "reward_std": alone.std(correction=0).item()}
    for examples in (made.ranking_examples(rankings, [[0, 1, 2], [3, 1], [5, 5]]), made.text_examples(texts)):
        for got in run_ranks(2, statistics, examples):
            assert got == pytest.approx(expected, rel=1e-5)


def peak_of_row(global_batch_size: int) -> int:
    settings = Settings(global_batch_size=global_batch_size, max_tokens=45)
    loader = batch.Loader(examples_of(RewardModel, 64), settings, seed=0, attention_cost=0.0)
    return max(len(row.tokens) for row in loader.at(0).rows)


def test_a_rows_size_does_not_grow_with_the_global_batch():
    assert all(peak_of_row(size) <= 45 for size in (8, 64))
