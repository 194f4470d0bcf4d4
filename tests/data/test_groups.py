"""rm.data.groups: pairs of one prompt are computed together, and nothing else changes."""

import numpy as np
import pytest
import torch

from rm.config import compose
from rm.data.batch import Loader, PackingSettings, PreferenceBatchSettings, pack
from rm.data.examples import Example, Examples
from rm.data.groups import alone, by_prompt, part_of
from rm.model.heads import RewardModel
from rm.model.losses import LossSettings
from rm.training import optim
from tests import made, reference, training_runs
from tests.ranks import run_ranks


def pairs_of_prompts(n_prompts: int, seed: int = 0, without_prompt: bool = True) -> Examples:
    """1 to 6 pairs of 4 replies to each prompt, in random order, with all that the record of a pair may say.

    Some replies begin alike; the first prompt is empty and the second one has pairs of two equal replies.
    """
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(0, 61, random.integers(low, high)).tolist()

    examples = []
    for n in range(n_prompts):
        prompt = ids(1, 9) if n or not without_prompt else []
        texts = [np.array(prompt + [7] * (n % 3) + ids(1, 10), np.int32) for _ in range(4)]
        for i, j in random.permutation([(0, 1), (0, 2), (0, 3), (1, 2), (3, 2), (1, 3)])[: random.integers(1, 7)]:
            if n == 1:
                j = i  # a tie: two equal replies that are computed apart may differ by rounding
            shared = made._example([texts[i].tolist(), texts[j].tolist()])
            examples.append(
                Example(
                    shared.prefix,
                    shared.replies,
                    shared.loss,
                    np.array([i != j, 0], np.float32),
                    label=random.choice([1.0, 1.0, 0.8, 0.5, 0.0]),
                    margin=random.choice([0.0, 0.5]),
                    weight=random.choice([1.0, 0.25, 2.0]),
                    strength=random.choice([1.0, 3.0]),
                    prompt=1000 - n,
                )  # fmt: skip
            )
    return Examples.build(examples[i] for i in random.permutation(len(examples)))


LOSS = LossSettings(label_smoothing=0.1, center_rewards_coefficient=0.05, scale_by_strength=True,
                    sft_loss_coefficient=0.02)  # fmt: skip


def reward_model(loss: LossSettings) -> RewardModel:
    """With an LM head if the loss needs one; the other values do not depend on it."""
    model = made.model(RewardModel)
    with_head = RewardModel(model.config, model.kernel, loss)
    with_head.load_state_dict(model.state_dict(), strict=False)
    if loss.has_sft_loss:
        torch.manual_seed(1)
        torch.nn.init.normal_(with_head.lm_head.weight, std=0.2)
    return with_head


def means_and_gradients(model: RewardModel, micro_batches) -> tuple[dict, list]:
    model.zero_grad()
    total: dict = {}
    count = sum(len(batch.label) for batch in micro_batches)
    for batch in micro_batches:
        sums = model(batch)
        (sums["loss"] / count).backward()
        total = {name: total.get(name, 0) + value.item() / count for name, value in sums.items()}
    return total, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("loss", [LossSettings(), LOSS, LossSettings(loss="plackett_luce")], ids=str)
def test_grouped_pairs_have_the_means_and_gradients_of_the_pairs_alone(loss, share_prefix):
    examples, model = pairs_of_prompts(7), reward_model(loss)
    if loss.loss == "plackett_luce":
        examples.label[:], examples.margin[:] = 1, 0
    groups = by_prompt(examples, share_prefix, max_tokens=45, label_chosen=loss.has_sft_loss)
    micro_batches = [
        pack(examples, [q], share_prefix, groups, loss.has_sft_loss) for q in range(len(groups.part_starts) - 1)
    ]
    apart = [pack(examples, [i], share_prefix, None, loss.has_sft_loss) for i in range(len(examples))]
    grouped, alone_ = means_and_gradients(model, micro_batches), means_and_gradients(model, apart)
    assert grouped[0] == pytest.approx(alone_[0], rel=1e-6, abs=1e-6)
    for one, other in zip(grouped[1], alone_[1], strict=True):
        assert (one - other).norm() <= 1e-6 * max(1.0, other.norm())
    assert sum(len(batch.tokens) for batch in micro_batches) < 0.8 * sum(len(batch.tokens) for batch in apart)


def test_each_distinct_reply_of_a_prompt_is_computed_once():
    pairs = [([1, 2, 5, 6], [1, 2, 7]), ([1, 2, 5, 6], [1, 2, 8]), ([1, 2, 8], [1, 2, 7])]
    examples = made.pair_examples(pairs)
    part = part_of(examples, range(3))
    assert part.prefix.tolist() == [1, 2] and [r.tolist() for r in part.replies] == [[5, 6], [7], [8]]
    assert [own.tolist() for own in part.compared] == [[0, 1], [0, 2], [2, 1]]
    examples.prompt[:] = 3
    batch = pack(examples, [0], groups=by_prompt(examples, True, 100))
    assert batch.segments == [(2, 2, 1, 1)] and batch.reply_table.tolist() == [[0, 1], [0, 2], [2, 1]]
    assert batch.example_indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("max_tokens", [32, 50, 500])
def test_the_sizes_of_parts_are_those_of_what_is_packed(share_prefix, max_tokens):
    examples = pairs_of_prompts(5, seed=max_tokens)
    groups = by_prompt(examples, share_prefix, max_tokens, label_chosen=True)
    assert sorted(groups.members) == list(range(len(examples)))
    assert len(groups) == 5 and groups.sizes.sum() == len(examples)
    for q in range(len(groups.lengths)):
        batch = pack(examples, [q], share_prefix, groups, label_chosen=True)
        assert len(set(examples.prompt[batch.example_indices])) == 1
        mask = reference.attention_mask(batch.segments, 0)
        assert groups.lengths[q] == len(batch.tokens) and groups.attention_pairs[q] == mask.sum()
        assert (groups.labels[q], groups.replies[q]) == (len(batch.targets), len(batch.reply_end))
        assert len(batch.tokens) <= max_tokens or len(batch.example_indices) == 1
    each = alone(examples, share_prefix, label_chosen=True)
    for i in range(len(examples)):
        assert each.labels[i] == len(pack(examples, [i], share_prefix, label_chosen=True).targets)


def loader_of(examples: Examples, max_tokens: int, label_chosen: bool = False, **settings) -> Loader:
    batch = PreferenceBatchSettings(group_by_prompt=True, **settings)
    return Loader(examples, batch, PackingSettings(max_tokens=max_tokens), 0, 0.01, label_chosen)


def examples_of_step(loader: Loader, step: int) -> list[int]:
    return np.concatenate([loader.groups.members_of(q) for q in loader.indices(step)]).tolist()


def test_a_step_takes_whole_prompts_until_it_has_enough_pairs(monkeypatch):
    examples = pairs_of_prompts(40)
    loader = loader_of(examples, 60, global_batch_size=10, num_train_epochs=3.5)
    assert loader.steps == sum(map(loader.steps_of, range(3))) + -(-loader.steps_of(3) // 2)
    start = 0
    for epoch in range(3):
        steps = [examples_of_step(loader, step) for step in range(start, start + loader.steps_of(epoch))]
        assert sorted(sum(steps, [])) == list(range(len(examples)))
        for n, of_step in enumerate(steps):
            prompts = [set(examples.prompt[part]) for part in (of_step, list(set(range(len(examples))) - set(of_step)))]
            assert not prompts[0] & prompts[1]
            assert n == len(steps) - 1 or 10 <= len(of_step) < 10 + 6
        start += len(steps)
    shuffle, shuffled = loader._shuffled, []
    monkeypatch.setattr(loader, "_shuffled", lambda epoch: shuffled.append(epoch) or shuffle(epoch))
    for step in (start - 2, start - 1):
        loader.step_batches(step, [])
    assert not shuffled, "an epoch that is over is not shuffled again"
    batches = loader.at(start - 2)
    assert (batches.num_examples, batches.num_prompts) == (
        len(of_step := steps[-2]),
        len(set(examples.prompt[of_step])),
    )


def test_what_a_step_takes_depends_neither_on_max_tokens_nor_on_the_steps_before_it():
    examples = pairs_of_prompts(40)
    small, large = (loader_of(examples, tokens, global_batch_size=10, num_train_epochs=2) for tokens in (32, 1000))
    assert small.steps == large.steps and len(small.lengths) > len(large.lengths)
    for step in (large.steps - 1, 3, 0):
        assert sorted(examples_of_step(small, step)) == sorted(examples_of_step(large, step))


def train_grouped(examples: Examples, steps: int) -> list[tuple[float, float]]:
    """(mean loss, gradient norm) of every step."""
    settings = compose(training_runs.Settings, learning_rate=1e-2)
    plain = reward_model(LOSS)
    model = training_runs.sharded(plain)
    optimizer = optim.adamw(model, settings.optim)
    loader = loader_of(examples, 60, label_chosen=True, global_batch_size=6)
    return [training_runs.run_step(model, optimizer, loader.at(step)) for step in range(steps)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_on_groups_is_that_on_the_pairs_of_each_step_alone(world_size):
    examples = pairs_of_prompts(6)
    model, loader = reward_model(LOSS), loader_of(examples, 60, label_chosen=True, global_batch_size=6)
    optimizer = optim.adamw(model, compose(training_runs.Settings, learning_rate=1e-2).optim)
    expected = []
    for step in range(2):
        indices = examples_of_step(loader, step)
        loss = sum(model(pack(examples, [i], label_chosen=True))["loss"] for i in indices) / len(indices)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    for lines in run_ranks(world_size, train_grouped, examples, 2):
        torch.testing.assert_close(torch.tensor(lines[0]), torch.tensor(expected[0]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(expected), rtol=3e-5, atol=1e-5)
