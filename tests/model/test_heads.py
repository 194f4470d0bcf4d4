"""rm.model.heads: packed and prefix-shared micro-batches against separate sequences, scores and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.config import compose
from rm.data.batch import pack
from rm.hf import build
from rm.model.feed_forward import MLPS
from rm.model.heads import COMPARISONS, LanguageModel, RewardModel
from rm.model.losses import LossSettings, preference_loss
from tests import made, reference
from tests.ranks import run_ranks

FAMILIES = pytest.mark.parametrize("config", made.CONFIGS.values(), ids=made.CONFIGS.keys())


def assert_same(model, loss, reference_loss) -> None:
    """Two losses of one model, and their gradients, agree to fp32 rounding."""
    torch.testing.assert_close(loss, reference_loss, rtol=2e-6, atol=1e-5)
    gradients = []
    for value in (loss, reference_loss):
        model.zero_grad(set_to_none=True)
        value.backward()
        gradients.append([p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


@FAMILIES
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), share=st.booleans())
def test_packed_pairs_score_and_learn_as_separate_sequences(config, seed, n, share):
    model = made.model(RewardModel, config, seed=seed)
    pairs = made.token_pairs(n, seed)
    batch = pack(made.pair_examples(pairs), np.arange(n), share)
    alone = torch.stack([reference.reward_of(model, text) for pair in pairs for text in pair])
    torch.testing.assert_close(model.rewards(batch), alone, rtol=1e-5, atol=1e-5)
    assert_same(model, model(batch)["loss"], reference.pair_loss_sum(model, pairs))


@FAMILIES
@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), share=st.booleans())
def test_packed_rankings_of_any_size_learn_as_separate_sequences(config, loss, seed, n, share):
    model = made.model(RewardModel, config, seed=seed)
    model.loss = LossSettings(loss=loss, center_rewards_coefficient=0.1)
    rankings, grades = made.token_rankings(n, seed)
    sums = model(pack(made.ranking_examples(rankings, grades), np.arange(n), share))
    assert sums["count"] == n
    alone = reference.ranking_loss_sum(model, rankings, grades, model.loss)
    assert_same(model, sums["loss"], alone.float())


@FAMILIES
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5))
def test_packed_texts_learn_as_separate_sequences(config, seed, n):
    model = made.model(LanguageModel, config, seed=seed)
    texts = [chosen for chosen, _ in made.token_pairs(n, seed, longest=20)]
    sums = model(pack(made.text_examples(texts), np.arange(n)))
    assert sums["count"] == sum(len(t) - 1 for t in texts)
    assert_same(model, sums["loss"], reference.text_loss_sum(model, texts))


def test_sums_are_over_pairs():
    model = made.model(RewardModel)
    batch = pack(made.pair_examples(made.token_pairs(6)), np.arange(6))
    sums, rewards = model(batch), model.rewards(batch).view(-1, 2)
    assert sums["accuracy"] == sum(chosen > rejected for chosen, rejected in rewards.tolist())
    assert sums["count"] == 6
    torch.testing.assert_close(sums["loss"], torch.nn.functional.softplus(rewards[:, 1] - rewards[:, 0]).sum())
    torch.testing.assert_close(sums["margin"], (rewards[:, 0] - rewards[:, 1]).sum())


def test_an_evaluation_also_measures_the_rewards_of_chosen_and_rejected_replies():
    model = made.model(RewardModel)

    def measured(batch) -> dict:
        tables = {name: getattr(batch, name) for name in COMPARISONS}
        measures = {name: values.sum() for name, values in model.measures(model.rewards(batch), **tables).items()}
        for name, value in model(batch).items():
            assert name == "count" or torch.equal(value, measures[name])
        return measures

    pairs = made.token_pairs(4)
    examples = made.pair_examples([*pairs, pairs[0]])
    examples.label[:] = [1, 0.8, 0.2, 0.5, 1]  # the third is turned round, the fourth is a tie
    batch = pack(examples, np.arange(5))
    sums, rewards = measured(batch), model.rewards(batch).view(-1, 2)
    chosen = rewards[[0, 1, 4], 0].sum() + rewards[2, 1] + rewards[3].mean()
    torch.testing.assert_close(sums["reward_chosen"], chosen)
    torch.testing.assert_close(sums["reward_rejected"], rewards.sum() - chosen)
    rankings, grades = made.token_rankings(6)
    sums = measured(pack(made.ranking_examples(rankings, grades), np.arange(6)))
    torch.testing.assert_close(sums["reward_chosen"] - sums["reward_rejected"], sums["margin"])


def test_a_tie_counts_half_in_the_accuracy():
    model = made.model(RewardModel)
    torch.nn.init.zeros_(model.score.weight)
    assert model(pack(made.pair_examples(made.token_pairs(5)), np.arange(5)))["accuracy"] == 2.5


@pytest.mark.parametrize("cls", [LanguageModel, RewardModel])
def test_an_empty_micro_batch_has_zero_loss_and_a_gradient_for_every_parameter(cls):
    model = made.model(cls)
    sums = model(pack(made.text_examples([[1]]), np.array([], np.int64)))
    assert sums["loss"].item() == 0 and sums["count"].item() == 0
    sums["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_model_with_tied_embeddings_has_no_separate_head():
    names = dict(made.model(LanguageModel, made.GPT_NEO).named_parameters())
    assert "lm_head.weight" not in names and "lm_head.weight" in dict(made.model(LanguageModel).named_parameters())


def test_a_script_trains_with_the_loss_of_its_settings(tmp_path):
    import train_rm
    from tests import tiny

    tiny.llama().save_pretrained(tmp_path)
    settings = compose(
        train_rm.Settings, model_name_or_path=str(tmp_path), dataset_path=("pairs.json",), output_dir="out",
        loss="plackett_luce", center_rewards_coefficient=0.1,
    )  # fmt: skip
    batch = pack(made.ranking_examples(*made.token_rankings(4, seed=1)), np.arange(4))

    def losses_of_settings():
        model = build.build(RewardModel, tmp_path, settings.parallel, training=build.Training(), loss=settings.loss)
        build.load(model, tmp_path, seed=0)
        table = model.rewards(batch).detach()[batch.reply_table]
        expected = preference_loss(table, batch.grade, batch.label, batch.margin, settings.loss)
        return model(batch)["loss"].item(), expected.sum().item()

    ((loss, expected),) = run_ranks(1, losses_of_settings)
    assert loss == pytest.approx(expected)


def count_operations(config, pairs) -> tuple[list[int], int, set[int]]:
    """Of a forward: the number of tokens in each matrix product, calls of attention, and widths of the products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    token_counts, widths, attention_calls = [], set(), 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal attention_calls
            if op.name() in ("aten::mm", "aten::addmm"):
                tokens, weight = args[-2:]
                token_counts.append(len(tokens))
                widths.add(weight.shape[-1])
            if "scaled_dot_product" in op.name():
                attention_calls += 1
            return op(*args, **(kwargs or {}))

    model = made.model(RewardModel, config)
    examples = made.pair_examples(pairs)
    with Recorder(), torch.no_grad():
        model(pack(examples, np.arange(len(examples))))
    return token_counts, attention_calls, widths


@FAMILIES
def test_a_forward_computes_each_prompt_once_and_makes_no_logits(config):
    pairs = [([1, 2, 3, 4, 5], [1, 2, 3, 6]), ([7, 8, 9], [7, 8, 10, 11]), ([12, 13], [14])]
    token_counts, attention_calls, widths = count_operations(config, pairs)
    distinct = (3 + 2 + 1) + (2 + 1 + 2) + (0 + 2 + 1)  # prompt, chosen, rejected
    scored = 2 * len(pairs)
    # The last layer's o_proj and MLP, and the score head, compute only the positions that are scored.
    of_scored = MLPS[config.mlp].matrices + 2
    assert [token_counts.count(n) for n in (distinct, scored)] == [len(token_counts) - of_scored, of_scored]
    assert attention_calls == 2 * len(pairs) * config.n_layers
    assert config.vocab_size not in widths


def test_check_data_names_a_token_without_an_embedding():
    model = made.model(RewardModel)
    fits, beyond = (made.pair_examples([([1, 2, last], [1, 3])]) for last in (60, 61))
    build.check_data(model, 512, fits)
    with pytest.raises(ValueError, match="token id 61, and the model has 61 embeddings"):
        build.check_data(model, 512, fits, beyond)
