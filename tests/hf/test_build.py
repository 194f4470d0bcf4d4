"""rm.hf.build: a model is built on the meta device, then loaded, with the same new values on any number of ranks."""

import json

import peft
import pytest
import torch
import torch.distributed as torch_dist

from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.hf.build import Training
from rm.model import lora
from rm.model.heads import LanguageModel, RewardModel
from rm.model.lora import LoraSettings
from rm.model.losses import LossSettings
from tests import made, tiny
from tests.ranks import run_ranks

FP32, BF16 = ParallelSettings(dtype="float32"), ParallelSettings(dtype="bfloat16")
LORA = Training(lora=LoraSettings(use_lora=True, lora_r=4))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return tiny.save_with(tiny.llama(), tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return tiny.save_with(tiny.reward_model("llama"), tmp_path_factory.mktemp("rm") / "model")


# On the meta device


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("training", [None, Training(), LORA], ids=["scoring", "full", "lora"])
def test_a_model_is_built_on_the_meta_device_from_config_json_alone(language_model, tmp_path, world, training):
    (tmp_path / "config.json").write_bytes((language_model / "config.json").read_bytes())

    def devices():
        model = build.build(RewardModel, tmp_path, FP32, training=training)
        return {p.device.type for p in model.parameters()}, sharding.is_sharded(model)

    assert run_ranks(world, devices) == [({"meta"}, world > 1)] * world


def test_a_training_names_the_dropout_that_it_leaves_out(tmp_path, capsys):
    folder = tiny.save_with(tiny.causal_lm("gpt2", attn_pdrop=0.0), tmp_path / "m")
    with dist.session(seed=0):
        build.load(build.build(RewardModel, folder, FP32, training=Training()), folder, seed=0)
    assert "without the dropout of its config.json (embd_pdrop 0.1, resid_pdrop 0.1)" in capsys.readouterr().out


def test_a_model_that_is_trained_has_float32_master_weights(reward_model):
    def dtypes(parallel, training):
        model = build.build(RewardModel, reward_model, parallel, training=training)
        return model.compute_dtype, {name: p.dtype for name, p in model.named_parameters()}

    for training, master in ((Training(), torch.float32), (None, torch.bfloat16)):
        ((compute_dtype, dtype_of),) = run_ranks(1, dtypes, BF16, training)
        assert compute_dtype == torch.bfloat16 and dtype_of.pop("score.weight") == torch.float32
        assert set(dtype_of.values()) == {master}


def test_only_a_model_that_is_trained_has_adapters(language_model):
    def adapters(training):
        model = build.build(LanguageModel, language_model, FP32, training=training)
        names = {name for name, _ in model.named_parameters() if lora.is_adapter(name)}
        return len(names), {name for name, p in model.named_parameters() if p.requires_grad} == names

    assert run_ranks(1, adapters, LORA) == [(2 * 2 * tiny.LLAMA["num_hidden_layers"], True)]
    assert run_ranks(1, adapters, None) == [(0, False)]


def test_a_reward_model_has_the_loss_that_it_is_given(reward_model):
    loss = LossSettings(loss="plackett_luce")
    assert build.build(RewardModel, reward_model, FP32, loss=loss, sharded=False).loss == loss
    assert build.build(RewardModel, reward_model, FP32, sharded=False).loss == LossSettings()


@pytest.mark.parametrize("parallel", [FP32, BF16], ids=["float32", "bfloat16"])
def test_what_scores_has_the_same_values_and_rewards_alone_and_in_shards_of_the_dtype(reward_model, parallel):
    def scored(sharded):
        model = build.build(RewardModel, reward_model, parallel, sharded=sharded)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        build.load(model, reward_model)
        size = sum(sharding.local(p).nbytes for p in model.parameters())
        with torch.no_grad():
            rewards = model.rewards(build.pack(made.pair_examples(made.token_pairs(3)), range(3)))
        return rewards, size, {name: p.dtype for name, p in model.named_parameters()}

    assert not torch_dist.is_initialized()
    alone, size, dtypes = scored(sharded=False)
    assert not torch_dist.is_initialized()  # an unsharded model needs no process group
    assert dtypes.pop("score.weight") == torch.float32 and set(dtypes.values()) == {getattr(torch, parallel.dtype)}
    ranks = run_ranks(2, scored, True)
    for rewards, _, of_rank in ranks:
        torch.testing.assert_close(rewards, alone, rtol=1e-5, atol=1e-5)
        assert of_rank == dtypes | {"score.weight": torch.float32}
    assert sum(of_rank for _, of_rank, _ in ranks) == size


# Values


def full_values(folder, training, seed):
    """The full values of the parameters on every rank, and the names of those that the folder lacks."""
    model = build.load(build.build(RewardModel, folder, FP32, training=training), folder, seed)
    values = {name: sharding.full_tensor(p).clone() for name, p in model.named_parameters()}
    return values, {name for name in values if name == "score.weight" or lora.is_adapter(name)}


def test_new_values_are_the_same_for_any_number_of_ranks(language_model):
    ((expected, new),) = run_ranks(1, full_values, language_model, LORA, 7)
    assert len(new) == 1 + 2 * 2 * tiny.LLAMA["num_hidden_layers"]
    for world in (2, 3):  # 3 does not divide the rows: shards are uneven
        for values, _ in run_ranks(world, full_values, language_model, LORA, 7):
            assert values.keys() == expected.keys()
            assert all(torch.equal(values[name], expected[name]) for name in expected)
    ((other, _),) = run_ranks(1, full_values, language_model, LORA, 8)
    differing = {name for name in expected if not torch.equal(other[name], expected[name])}
    assert differing == {name for name in new if not name.endswith(".lora_B")}


def test_a_new_score_head_is_normal_and_an_adapter_adds_nothing_at_first(tmp_path):
    width = 1024
    folder = tiny.save_with(tiny.llama(hidden_size=width, num_hidden_layers=1), tmp_path / "model")
    ((values, new),) = run_ranks(1, full_values, folder, LORA, 0)
    score = values["score.weight"] * (width + 1) ** 0.5
    assert score.mean().item() == pytest.approx(0, abs=0.1) and score.std().item() == pytest.approx(1, abs=0.1)
    for name in new - {"score.weight"}:
        assert values[name].any() == name.endswith(".lora_A")


def test_a_seed_changes_nothing_that_the_folder_holds(reward_model):
    ((with_seed, _),) = run_ranks(1, full_values, reward_model, None, 0)
    ((without, _),) = run_ranks(1, full_values, reward_model, None, None)
    assert all(torch.equal(with_seed[name], without[name]) for name in without)
    assert torch.equal(without["score.weight"], tiny.ours(reward_model, RewardModel).score.weight)


def test_a_language_model_without_a_seed_is_refused_as_a_reward_model(language_model):
    model = build.build(RewardModel, language_model, FP32, sharded=False)
    with pytest.raises(ValueError, match=f"{language_model} is not a reward model: it holds no score.weight"):
        build.load(model, language_model)


# Data and folders


def test_check_data_names_a_token_without_an_embedding():
    model = made.model(RewardModel)
    fits, beyond = (made.pair_examples([([1, 2, last], [1, 3])]) for last in (60, 61))
    build.check_data(model, 10**6, fits)
    with pytest.raises(ValueError, match="a text has the token id 61, and the model has 61 embeddings"):
        build.check_data(model, 512, fits, beyond)


def test_check_data_refuses_texts_longer_than_learned_positions():
    model, examples = made.model(LanguageModel, made.GPT_NEO), made.text_examples([[1, 2]])
    build.check_data(model, 128, examples)
    with pytest.raises(ValueError, match="--max_length 129 is more than the 128 positions of the model: lower it"):
        build.check_data(model, 129, examples)


def test_check_data_refuses_texts_in_which_dynamic_rope_would_change(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = tiny.save_with(tiny.llama(rope_parameters=rope, max_position_embeddings=64), tmp_path / "m")
    model = build.build(LanguageModel, folder, FP32, sharded=False)
    build.check_data(model, 64)
    with pytest.raises(ValueError, match="--max_length 65 is more than the 64 positions of the model: lower it"):
        build.check_data(model, 65)


def test_head_of_reads_what_a_model_or_an_adapter_declares(language_model, reward_model, tmp_path):
    assert build.head_of(language_model) is LanguageModel and build.head_of(reward_model) is RewardModel
    for task, model, cls in (
        ("CAUSAL_LM", tiny.llama(), LanguageModel),
        ("SEQ_CLS", tiny.reward_model("llama"), RewardModel),
    ):
        config = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / task)
        assert build.head_of(tmp_path / task) is cls
    (tmp_path / "config.json").write_text("{}")
    assert build.head_of(tmp_path) is LanguageModel


@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_are_not_finite_are_not_exported(language_model, tmp_path, world):
    """The last update of a run may have made them so: no later loss would show it."""

    def save(rank_with_nan):
        model = build.load(build.build(RewardModel, language_model, FP32, training=Training()), language_model, seed=0)
        if dist.rank() == rank_with_nan:
            with torch.no_grad():
                sharding.local(model.layers[1].mlp.up_proj.weight)[0, 0] = float("nan")
        examples = made.pair_examples(made.token_pairs(2))
        build.save(model, tmp_path / "out", str(language_model), LoraSettings(), examples)

    with pytest.raises(RuntimeError, match="the trained weights are not finite"):
        run_ranks(world, save, world - 1)
    assert not (tmp_path / "out").exists()


def test_an_adapter_replaces_one_and_what_a_killed_process_left_but_no_other_folder(language_model, tmp_path):
    def save():
        model = build.load(build.build(RewardModel, language_model, FP32, training=LORA), language_model, seed=0)
        build.save(model, tmp_path, str(language_model), LORA.lora, made.pair_examples(made.token_pairs(2)))

    adapter, writing = tmp_path / "adapter", tmp_path / ".adapter.writing"
    for folder in (adapter, writing):
        folder.mkdir()
        (folder / ".tmp5Grrpn").write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match="exists and is not an adapter, so it is not replaced"):
        run_ranks(1, save)
    assert [file.name for file in adapter.iterdir()] == [".tmp5Grrpn"]
    (adapter / "adapter_config.json").write_text("{}")
    run_ranks(1, save)
    assert not writing.exists() and not (adapter / ".tmp5Grrpn").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
