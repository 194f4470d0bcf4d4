"""Weights, strengths and the SFT loss of chosen replies: against formulas, and a plain twin made of transformers."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rm.data.batch import pack
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.model import losses
from rm.model.heads import RewardModel
from rm.model.lora import LoraSettings
from rm.model.losses import LossSettings
from tests import made, text_fixtures, tiny
from tests.ranks import run_ranks
from tests.reference import cross_entropy_sum

COEFFICIENT = 0.03
LOSS = LossSettings(sft_loss_coefficient=COEFFICIENT)


def test_scaled_bradley_terry_is_the_strength_times_the_loss_of_the_pair():
    """arXiv 2410.01257: -m log sigmoid(r_chosen - r_rejected), with m from 1 (slightly better) to 3 (much better)."""
    rewards, strength = torch.randn(6, 2), torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 0.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.5, 4.0, 1.0])
    labels = torch.tensor([[1.0, 0.0]] * 6), torch.ones(6), torch.zeros(6)
    plain = -torch.log(torch.sigmoid(rewards[:, 0] - rewards[:, 1]))
    for settings, factor in ((LossSettings(), weight), (LossSettings(scale_by_strength=True), weight * strength)):
        loss = losses.preference_loss(rewards, *labels, settings, weight, strength)
        torch.testing.assert_close(loss, factor * plain)
    centred = LossSettings(scale_by_strength=True, center_rewards_coefficient=0.1)
    loss = losses.preference_loss(rewards, *labels, centred, weight, strength)
    torch.testing.assert_close(loss, weight * (strength * plain + 0.1 * rewards.sum(1) ** 2))


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_factors_multiply_the_cross_entropy_of_each_token(monkeypatch, frozen_head, softcap):
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", 40)
    hidden, weight = torch.randn(11, 6, dtype=torch.double), torch.randn(19, 6, dtype=torch.double)
    targets, factors = torch.randint(19, (11,)), torch.rand(11)
    results = []
    for plain in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen_head)
        if plain:
            each = [cross_entropy_sum(h[i : i + 1], w, targets[i : i + 1], 0.5, softcap) for i in range(11)]
            loss = (torch.stack(each) * factors).sum()
        else:
            loss = losses.linear_cross_entropy(h, w, targets, 0.5, softcap, factors)
        loss.backward()
        results.append((loss.detach().double(), h.grad, torch.zeros(0) if frozen_head else w.grad))
    for fast, full in zip(*results, strict=True):
        torch.testing.assert_close(fast, full, rtol=1e-6, atol=1e-6)


def grm_twin(model, score: torch.Tensor, pairs: list, prompts: list[int]) -> torch.Tensor:
    """The loss of GRM (arXiv 2406.10216), text by text: reward loss and log-likelihood of the chosen replies.

    Args:
        model: a causal language model of transformers.
        score: (1, D) of the reward head.
        prompts: the number of tokens of each pair's prompt.
    """
    total = torch.zeros(())
    for (chosen, rejected), prompt in zip(pairs, prompts, strict=True):
        rewards = []
        for text in (chosen, rejected):
            output = model(torch.tensor([text]), output_hidden_states=True)
            rewards.append((output.hidden_states[-1][0, -1] @ score.T)[0])
            if text is chosen:
                log_probabilities = output.logits[0, :-1].log_softmax(-1)
                of_targets = log_probabilities.gather(1, torch.tensor(chosen[1:])[:, None])[:, 0]
                log_likelihood = of_targets[max(0, prompt - 1) :].sum()
        total = total - F.logsigmoid(rewards[0] - rewards[1]) - COEFFICIENT * log_likelihood
    return total / len(pairs)


@pytest.fixture
def folders(tmp_path):
    """Language models with an LM head of their own and with a tied one."""
    text_fixtures.byte_level(tmp_path / "own")
    text_fixtures.byte_level(tmp_path / "tied")
    return {
        "own": (tmp_path / "own", tiny.llama(vocab_size=400)),
        "tied": (tmp_path / "tied", tiny.llama(vocab_size=400, tie_word_embeddings=True)),
    }


def loaded(folder, **options) -> RewardModel:
    training = build.Training(**options)
    model = build.build(RewardModel, folder, ParallelSettings(), training=training, loss=LOSS)
    return build.load(model, folder, seed=0)


def loss_and_gradients(folder, pairs):
    model = loaded(folder)
    batch = pack(made.pair_examples(pairs), range(len(pairs)), label_chosen=True)
    sums = model(batch)
    (sums["loss"] / sums["count"]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    evaluated = model(batch)
    assert "sft_loss" not in evaluated and evaluated["loss"] < sums["loss"]  # the loss of the rewards alone
    return sums["loss"] / sums["count"], gradients, model.score.weight.detach()


@pytest.mark.parametrize("head", ["own", "tied"])
def test_reward_and_sft_loss_of_one_forward_are_those_of_a_plain_twin(folders, head):
    folder, theirs = folders[head]
    theirs.save_pretrained(folder)
    pairs = [pair for pair in made.token_pairs(12, seed=3) if pair[0] != pair[1]]
    prompts = [len(example.prefix) for example in made.pair_examples(pairs)]
    ((loss, gradients, score),) = run_ranks(1, loss_and_gradients, folder, pairs)
    score.requires_grad_()
    expected = grm_twin(theirs, score, pairs, prompts)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["score.weight"], score.grad, rtol=1e-4, atol=1e-6)
    embedding = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(gradients["embed.weight"], embedding, rtol=1e-4, atol=1e-6)
    if head == "own":
        torch.testing.assert_close(gradients["lm_head.weight"], theirs.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_chosen_reply_is_the_best_one_and_a_tie_has_none():
    examples = made.ranking_examples([[[1, 2], [1, 3]], [[1, 2], [1, 3]], [[4, 5], [4, 6], [4, 7]], [[1, 8], [1, 9]]],
                                     [[1, 0], [1, 0], [0, 2, 2], [1, 1]])  # fmt: skip
    examples.label[1], examples.weight[2] = 0.2, 3
    batch = pack(examples, range(4), label_chosen=True)
    assert batch.targets.tolist() == [2, 3, 6, 7] and batch.label_weights.tolist() == [1, 1, 1.5, 1.5]


def exported(folder, out, lora: LoraSettings):
    model = loaded(folder, lora=lora)
    assert model.lm_head.weight.requires_grad is not lora.use_lora
    build.save(model, out, str(folder), lora, made.pair_examples(made.token_pairs(3)), None)


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_lm_head_is_left_out_of_the_model_that_is_saved(folders, tmp_path, use_lora):
    folder, theirs = folders["own"]
    theirs.save_pretrained(folder)
    run_ranks(1, exported, folder, tmp_path / "out", LoraSettings(use_lora=use_lora, lora_r=4))
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert "score.weight" in saved and not any("lm_head" in name for name in saved)
    transformers = pytest.importorskip("transformers")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="--sft_loss_coefficient needs the LM head of a language model, and .* is a"):
        build.build(RewardModel, tmp_path / "out" / "model", ParallelSettings(), training=build.Training(), loss=LOSS)
