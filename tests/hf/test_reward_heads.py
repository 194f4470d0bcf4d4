"""Reward heads of others: a bias, two layers, several outputs. Models that transformers has no reward class for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from rm.data.batch import Loader, pack
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import build, saving
from rm.hf.outputs import HeadSettings
from rm.model.heads import LanguageModel, RewardModel
from rm.training import optim
from tests import made, tiny
from tests.family_cases import gap, their_reward
from tests.ranks import run_ranks
from tests.training_runs import load_reward_model, lora_settings, run_step

FP32 = ParallelSettings(dtype="float32")
PAIRS = made.token_pairs(6, longest=40)


def rewards(model):
    with torch.no_grad():
        return model.rewards(pack(made.pair_examples(PAIRS), np.arange(len(PAIRS))))


def scored_by(hf_model, head):
    """The head on the last state of every text, by a base model of transformers."""
    texts = [torch.as_tensor(text) for pair in PAIRS for text in pair]
    with torch.no_grad():
        return torch.stack([head(hf_model(text[None]).last_hidden_state[0, -1])[0] for text in texts])


def assert_close(actual, expected):
    assert gap(actual, expected) <= 1e-5


def with_head(folder, family, tensors, **edits):
    """A folder whose model has other tensors for its head, and settings in config.json."""
    source = tiny.save_with(tiny.reward_model(family), folder)
    stored = {name: t for name, t in load_file(source / "model.safetensors").items() if not name.startswith("score.")}
    save_file(stored | tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | edits))
    return source


@pytest.fixture
def two_layers(tmp_path):
    """(folder, its head): nn.Sequential(nn.Linear, nn.ReLU, nn.Linear), as modeling_qwen2_rm.py has it."""
    head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    tensors = {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    return with_head(tmp_path / "m", "qwen2", tensors, architectures=["Qwen2ForRewardModel"]), head


def test_a_head_of_two_layers_is_read_by_its_class_and_saved(tmp_path, two_layers):
    source, head = two_layers
    assert build.head_of(source) is RewardModel
    model = tiny.ours(source, RewardModel)
    assert_close(rewards(model), scored_by(AutoModel.from_pretrained(source).eval(), head))
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.bfloat16)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("score."))  # in float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForRewardModel"]


def test_a_head_of_two_layers_trains_on_two_ranks_as_on_one_and_is_in_the_adapter(two_layers, tmp_path):
    source, _ = two_layers
    settings = lora_settings(lora_target_modules=("q_proj", "v_proj"))

    def train(out=None):
        model = load_reward_model(source, settings)
        before = {name: p.detach().clone() for name, p in model.score.named_parameters()}
        optimizer, examples = optim.adamw(model, settings.optim), made.pair_examples(made.token_pairs(12))
        loader = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=model.config.attention_cost)
        lines = [run_step(model, optimizer, loader.at(step), settings.optim.max_grad_norm) for step in range(2)]
        moved = [not torch.equal(p, before[name]) for name, p in model.score.named_parameters()]
        if out is not None:
            build.save(model, out, str(source), settings.lora, examples)
        return torch.tensor(lines), moved

    (one,) = run_ranks(1, train, tmp_path / "one")
    for lines, _ in run_ranks(2, train):
        torch.testing.assert_close(lines, one[0], rtol=1e-4, atol=1e-5)
    assert one[1] == [True, True, True, False]  # the last is a bias, of which no difference of rewards depends
    adapted = rewards(tiny.ours(tmp_path / "one" / "adapter", RewardModel))
    assert_close(rewards(tiny.ours(tmp_path / "one" / "model", RewardModel)), adapted)


def test_the_bias_of_a_head_is_left_out_and_said(tmp_path, capsys):
    hf_model = tiny.reward_model("llama")
    tensors = {"v_head.summary.weight": hf_model.score.weight.detach(), "v_head.summary.bias": torch.tensor([0.25])}
    model = tiny.ours(with_head(tmp_path / "m", "llama", tensors), RewardModel)
    assert "v_head.summary.bias is left out" in capsys.readouterr().out
    assert_close(rewards(model), torch.stack([their_reward(hf_model, text) for pair in PAIRS for text in pair]))


def test_one_output_of_several_is_the_reward(tmp_path):
    hf_model = tiny.reward_model("llama", num_labels=3)
    source = tiny.save_with(hf_model, tmp_path / "m")
    with dist.session(seed=0):
        model = build.build(RewardModel, source, FP32, sharded=False, head=HeadSettings(reward_label="2"))
        build.load(model, source)
        saving.save(model, tmp_path / "out", source, torch.float32)
        for label, message in ((None, "has 3 outputs: name"), ("3", "has 3 outputs, and --reward_label is 3: name")):
            head = HeadSettings(reward_label=label)
            with pytest.raises(ValueError, match=message):
                build.load(build.build(RewardModel, source, FP32, sharded=False, head=head), source)
        single = tiny.save_with(tiny.reward_model("llama"), tmp_path / "single")
        for head, message in (
            (HeadSettings(reward_label="3"), "has one output, and --reward_label is 3: leave that out"),
            (HeadSettings(reward_weights=(0.5, 1.0)), "has one output, and --reward_weights has 2 numbers: leave"),
        ):
            with pytest.raises(ValueError, match=message):
                build.load(build.build(RewardModel, single, FP32, sharded=False, head=head), single)
        with pytest.raises(ValueError, match="are of a linear reward head, and of a model with one reward"):
            build.build(LanguageModel, source, FP32, head=HeadSettings(reward_label="0"))
    with torch.no_grad():
        expected = torch.stack([hf_model(torch.as_tensor(text)[None]).logits[0, 2] for pair in PAIRS for text in pair])
    assert_close(rewards(model), expected)
    assert_close(rewards(tiny.ours(tmp_path / "out", RewardModel)), expected)


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight"])
def test_a_head_that_is_not_finite_is_refused(tmp_path, name):
    """Every reward would be NaN, and every comparison a tie or an error far from its cause."""
    folder = with_head(tmp_path / "m", "llama", {name: torch.full((1, 32), 0.5).index_fill(1, torch.tensor(3), np.nan)})
    with pytest.raises(ValueError, match=rf"model.safetensors: {name}, the reward head, holds numbers that are not"):
        tiny.ours(folder, RewardModel)


def test_a_reward_model_without_a_class_in_transformers_is_opened_as_the_docs_say(tmp_path, capsys):
    """Granite, by AutoModel and score.weight: docs/exports.md."""
    source = tiny.save_with(tiny.reward_model("granite"), tmp_path / "m")
    model = tiny.ours(source, RewardModel)
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    base = AutoModel.from_pretrained(tmp_path / "out").eval()
    score = load_file(tmp_path / "out" / "model.safetensors")["score.weight"]
    assert_close(rewards(model), scored_by(base, lambda state: score @ state))
    assert "transformers has no GraniteForSequenceClassification" in capsys.readouterr().out
