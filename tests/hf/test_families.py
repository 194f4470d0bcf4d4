"""rm.hf.families: every family computes what transformers computes, and refuses what it does not implement."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rm.data.batch import EvalBatches, Loader, pack
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import adapter, build, families, saving, weights
from rm.hf.folder import padding_id
from rm.model import lisa, lora
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.model.nf4 import count_parameters
from rm.scoring.score import all_rewards
from rm.training import optim
from tests import made, real_configs, refused_configs, tiny
from tests.family_cases import (
    CASES,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    LONGROPE,
    YARN_ROPE,
    gap,
    gradient_gaps,
    losses_of_pairs,
    losses_of_texts,
    their_reward,
)
from tests.ranks import run_ranks
from tests.training_runs import load_reward_model, lora_settings, run_step

FAMILIES = sorted(tiny.SETTINGS)
FP32 = ParallelSettings(dtype="float32")
LLAMA_HF = tiny.LLAMA | {"model_type": "llama"}
QWEN3_HF = tiny.LLAMA | {"model_type": "qwen3"}
GPT2_HF = tiny.SETTINGS["gpt2"] | {"model_type": "gpt2"}
GPT_NEO_HF = tiny.GPT_NEO | {"model_type": "gpt_neo"}
in_every_case = pytest.mark.parametrize(
    "family, settings",
    [(family, settings) for family, _, settings in CASES],
    ids=[f"{f} {name}" for f, name, _ in CASES],
)
in_every_family = pytest.mark.parametrize("family", FAMILIES)


def read(hf):
    return families.find(hf).read(hf)


def assert_close(actual, expected):
    assert gap(actual, expected) <= 1e-5


# Logits and rewards


@in_every_case
def test_logits_equal_those_of_transformers_within_and_beyond_windows(tmp_path, family, settings):
    hf_model = tiny.causal_lm(family, **settings)
    model = tiny.ours(tiny.save_with(hf_model, tmp_path / "m"))
    for length in (1, 50, 300):
        tokens = tiny.tokens(length)
        assert_close(tiny.logits(model, tokens), tiny.their_logits(hf_model, tokens))


@in_every_family
def test_bfloat16_logits_are_as_close_to_float32_as_in_transformers(tmp_path, family):
    hf_model, tokens = tiny.causal_lm(family), tiny.tokens(200)
    folder = tiny.save_with(hf_model, tmp_path / "m")
    exact = tiny.their_logits(hf_model, tokens)
    their_error = (tiny.their_logits(hf_model.bfloat16(), tokens).float() - exact).norm()
    our_error = (tiny.logits(tiny.ours(folder, dtype=torch.bfloat16), tokens).float() - exact).norm()
    assert 0 < our_error < 1.2 * their_error


@in_every_case
def test_rewards_of_packed_pairs_equal_those_of_transformers(tmp_path, family, settings):
    hf_model = tiny.reward_model(family, **settings)
    model = tiny.ours(tiny.save_with(hf_model, tmp_path / "m"), RewardModel)
    pairs = made.token_pairs(6, longest=40)
    with torch.no_grad():
        rewards = model.rewards(pack(made.pair_examples(pairs), np.arange(6)))
    assert_close(rewards, torch.stack([their_reward(hf_model, text) for pair in pairs for text in pair]))


def test_rope_frequencies_are_bit_identical_to_those_of_transformers():
    """Angles are fp32 products: at position 100,000 a difference in the last bit of a frequency would be visible."""
    for rope in ({"rope_type": "default", "rope_theta": 5e5}, LLAMA3_ROPE, YARN_ROPE, LINEAR_ROPE):
        expected = tiny.llama(rope_parameters=dict(rope), head_dim=64).model.rotary_emb
        first_layer, *_ = read(LLAMA_HF | {"rope_parameters": rope, "head_dim": 64}).ropes
        assert torch.equal(torch.tensor(first_layer.frequencies), expected.inv_freq)
        assert first_layer.scale == expected.attention_scaling


def test_the_window_of_gpt_neo_changes_logits_only_beyond_it(tmp_path):
    local, everywhere = (
        tiny.ours(tiny.save_with(tiny.gpt_neo(attention_types=[[[kind], 4]]), tmp_path / kind))
        for kind in ("local", "global")
    )
    tokens = tiny.tokens(300)
    gap = (tiny.logits(local, tokens) - tiny.logits(everywhere, tokens)).abs().amax(-1)
    assert gap[:256].max() < 1e-5 < 1e-2 < gap[260:].min()


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "family, edits",
    [
        ("mistral", {"layer_types": ["full_attention", "full_attention"]}),  # a ministral in transformers
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25, "rotary_emb_base": 100, "rope_theta": 5000}),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50}),
        ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": 16}, "rope_theta": 500, "head_dim": 32}
         | {"original_max_position_embeddings": 32}),
        ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7}}),
        ("phi3", {"original_max_position_embeddings": 32}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 300}}, "rope_local_base_freq": 20}
         | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("gpt2", {"hidden_size": 32, "num_attention_heads": 4}),
        ("granitemoehybrid", {"layer_types": ["attention", "attention"]}),
        ("llama", {"sliding_window": None, "head_dim": None, "num_key_value_heads": None}),
    ],
)  # fmt: skip
def test_a_config_in_another_spelling_is_read_as_transformers_reads_it(tmp_path, family, edits):
    folder = tiny.save_with(tiny.causal_lm(family, **{k: v for k, v in edits.items() if k == "head_dim"}), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | edits))
    tokens = tiny.tokens(60)
    expected = tiny.their_logits(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)
    assert_close(tiny.logits(tiny.ours(folder), tokens), expected)


def test_every_key_that_transformers_writes_is_known():
    """Of each family's class, with its defaults written out, and with the keys that older versions wrote."""
    written_before = {
        "torch_dtype": "bfloat16", "_attn_implementation_autoset": True, "pruned_heads": {}, "torchscript": False,
        "do_sample": True, "max_length": 20, "num_beams": 1, "top_k": 50, "gradient_checkpointing": False,
        "num_labels": 1, "finetuning_task": None, "use_mrope": False, "cross_attention_hidden_size": None,
        "tie_encoder_decoder": False, "decoder_start_token_id": None, "tokenizer_class": "LlamaTokenizer",
        "problem_type": "regression", "unsloth_version": "2025.1.1", "auto_map": {"AutoModel": "modeling.Model"},
    }  # fmt: skip
    defaults = tiny.transformers.GenerationConfig._get_default_generation_params()
    for family in FAMILIES:
        config = tiny.transformers.AutoConfig.for_model(family, **tiny.DENSE.get(family, {}))
        written = json.loads(config.to_json_string(use_diff=False))
        everything = written_before | {name: value for name, value in defaults.items() if name not in written}
        assert read(written | everything) == read(written)


@in_every_family
def test_the_defaults_of_a_config_that_has_only_its_sizes_are_those_of_transformers(family):
    config = tiny.transformers.AutoConfig.for_model(family, **tiny.DENSE.get(family, {}))
    full = json.loads(config.to_json_string(use_diff=False))
    required = [name for name, key in families.FAMILIES[family].keys.items() if key.required]
    assert read({name: full[name] for name in ("model_type", *required)}) == read(full)


@in_every_family
def test_the_padding_of_a_config_without_one_is_that_of_transformers(family):
    assert padding_id({"model_type": family}) == tiny.transformers.AutoConfig.for_model(family).pad_token_id


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"a_feature_of_next_year": 2}, "a_feature_of_next_year 2 is not implemented: .*; if it does not, remove it"),
        ({"per_layer_config": {"1": {"head_dim": 4}}}, "per_layer_config .* is not implemented"),
        ({"architectures": ["LlamaForRewardModelWithGating"]}, r"architectures\[0\] 'LlamaForRewardModelWithGating'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM' has to be of type list"),
        ({"vocab_size": "99"}, "vocab_size '99' has to be of type whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000 has to be at most 10,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 has to be at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan has to be a finite number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' has to be of type true or false"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\] 'sliding_attention'"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' has to be of type object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor '2' has to be of type number"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section .* not implemented"),
        ({"value_head_prefix": "my_head"}, "value_head_prefix 'my_head' is not implemented, only 'score' or"),
    ],
)
def test_an_unknown_key_or_another_type_is_refused_by_name(edits, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(LLAMA_HF | edits)


@pytest.mark.parametrize(
    "name, reward",
    [("LlamaForCausalLM", False), ("LlamaForSequenceClassification", True), ("RewardModel", True)]
    + [("LlamaRewardModel", True), ("LlamaModel", False)],
)
def test_classes_that_compute_the_same_are_read(tmp_path, name, reward):
    hf = LLAMA_HF | {"architectures": [name]}
    assert read(hf) == read(LLAMA_HF)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert build.head_of(tmp_path) is (RewardModel if reward else LanguageModel)


def test_two_names_of_one_setting_have_to_agree():
    assert read(GPT2_HF | {"hidden_size": 32}) == read(GPT2_HF)
    with pytest.raises(ValueError, match="hidden_size 64 and n_embd 32 are the same setting"):
        read(GPT2_HF | {"hidden_size": 64})


# Gradients and training


@in_every_family
def test_gradients_of_packed_texts_equal_those_of_transformers(tmp_path, family):
    lm, rm = tiny.causal_lm(family), tiny.reward_model(family)
    for hf_model, head, losses in ((lm, LanguageModel, losses_of_texts), (rm, RewardModel, losses_of_pairs)):
        folder = tiny.save_with(hf_model, tmp_path / head.__name__)
        model = tiny.ours(folder, head)
        gaps = gradient_gaps(folder, model, hf_model, *losses(model, hf_model))
        assert max(gaps.values()) <= 1e-5, gaps


TRAINING_FLAGS = {
    "LoRA": {"lora_target_modules": ("q_proj", "v_proj", "down_proj")},
    "LISA": {"use_lora": False, "use_lisa": True, "lisa_activated_layers": 1, "lisa_interval_steps": 1},
}


def train(folder):
    """Method -> losses and gradient norms of two steps of a reward model, and scores after them."""
    results = {}
    for method, flags in TRAINING_FLAGS.items():
        settings = lora_settings(**flags)
        model = load_reward_model(folder, settings)
        optimizer = optim.adamw(model, settings.optim)
        examples, cost = made.pair_examples(made.token_pairs(12)), model.config.attention_cost
        loader = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=cost)
        lines = []
        for step in range(2):
            lisa.activate_layers(model, optimizer, step, settings.lisa, seed=0)
            lines.append(run_step(model, optimizer, loader.at(step), settings.optim.max_grad_norm))
        held_out = EvalBatches(made.pair_examples(made.token_pairs(5, seed=9)), settings.packing)
        results[method] = torch.tensor(lines), all_rewards(model, held_out)
    return results


# One of each kind of architecture.
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo3", "qwen3"])
def test_two_ranks_train_as_one_with_lora_and_with_lisa(tmp_path, family):
    folder = tiny.save_with(tiny.causal_lm(family), tmp_path / "m")
    (one,), many = run_ranks(1, train, folder), run_ranks(2, train, folder)
    for method, (lines, scores) in one.items():
        for other_lines, other_scores in (results[method] for results in many):
            torch.testing.assert_close(other_lines, lines, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other_scores, scores, rtol=1e-3, atol=1e-4)


@in_every_family
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")], ids=" ".join)
def test_peft_loads_a_saved_adapter_and_transformers_the_merged_model(tmp_path, family, targets):
    source = tiny.save_with(tiny.causal_lm(family), tmp_path / "m")
    config, data, _ = weights.read_config(source)
    model = LanguageModel(config, SplitAttention)
    settings = lora.LoraSettings(
        lora_r=4, lora_alpha=6.0, lora_dropout=0.0, lora_target_modules=targets, use_rslora=len(targets) == 2
    )
    lora.adapt(model, settings, torch.float32)
    weights.load(model, source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(std=0.2)
    tokens = tiny.tokens(50)
    logits = tiny.logits(model, tokens)
    with dist.session(seed=0):
        adapter.save(model, tmp_path / "adapter", str(source), settings, data)
        adapter.merge(model)
        saving.save(model, tmp_path / "merged", source, torch.float32)
    base, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "merged"))
    assert (logits - tiny.their_logits(base, tokens)).abs().max() > 0.1
    assert_close(logits, tiny.their_logits(merged, tokens))
    assert_close(logits, tiny.logits(tiny.ours(tmp_path / "adapter"), tokens))
    assert_close(logits, tiny.their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), tokens))


# Checkpoint files


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "value_head.weight"),
        ("gpt_neox", "value_head.weight"),
        ("llama", "v_head.weight"),
        ("llama", "v_head.summary.weight"),
        ("llama", "score_head.weight"),
        ("llama", "regression_head.weight"),
        ("mistral", "regression_head.weight"),
        ("llama", "reward_head.weight"),
        ("llama", "rm_head.weight"),
    ],
)
def test_score_heads_of_other_trainers_are_loaded_and_saved_as_score(tmp_path, family, name):
    """The names that TRL, OpenRLHF, safe-rlhf, UltraRM and Eurus use."""
    hf_model = tiny.reward_model(family)
    source = tiny.save_with(hf_model, tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors.pop("score.weight")
    save_file(tensors, source / "model.safetensors")
    model = tiny.ours(source, RewardModel)
    assert torch.equal(model.score.weight, hf_model.score.weight)
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")


@in_every_case
@pytest.mark.parametrize("head", [LanguageModel, RewardModel])
def test_a_loaded_and_saved_model_has_the_same_tensors_in_transformers(tmp_path, family, settings, head):
    make, auto = {
        LanguageModel: (tiny.causal_lm, AutoModelForCausalLM),
        RewardModel: (tiny.reward_model, AutoModelForSequenceClassification),
    }[head]
    source = tiny.save_with(make(family, **settings), tmp_path / "m")
    with dist.session(seed=0):
        saving.save(tiny.ours(source, head), tmp_path / "out", source, torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert opened.config.architectures == [type(make(family, **settings)).__name__]


@in_every_case
def test_the_name_table_maps_every_parameter_there_and_back(family, settings):
    hf = tiny.transformers.AutoConfig.for_model(family, **(tiny.SETTINGS[family] | settings)).to_dict()
    family = families.find(hf)
    with torch.device("meta"):
        names = {
            name
            for head in (LanguageModel, RewardModel)
            for name, _ in head(read(hf), SplitAttention).named_parameters()
        }
    for name in names:
        hf_name = family.checkpoint_name(name)
        assert name in family.parameter_names(hf_name)
        # The name in a checkpoint of a base model without a head.
        assert name in family.parameter_names(hf_name.removeprefix(family.prefix))


@pytest.mark.parametrize(
    "hf, name",
    [
        (LLAMA_HF, "model.layers.11.self_attn.rotary_emb.inv_freq"),
        (GPT_NEO_HF, "transformer.h.3.attn.attention.masked_bias"),
        (GPT_NEO_HF, "h.3.attn.attention.bias"),
        (GPT2_HF, "h.3.attn.bias"),
        (LLAMA_HF | {"model_type": "gpt_neox"}, "gpt_neox.layers.3.attention.masked_bias"),
    ],
)
def test_buffers_in_old_checkpoints_are_ignored(hf, name):
    assert families.find(hf).is_ignored(name)
    assert families.find(hf).parameter_names(name) == []
    assert not families.find(hf).is_ignored(name + "es")


# config.json


@pytest.mark.parametrize("name", real_configs.CONFIGS)
def test_published_configs_give_published_sizes_with_or_without_defaults(name):
    hf, size = real_configs.CONFIGS[name]
    config = read(hf)
    with torch.device("meta"):
        model = LanguageModel(replace(config, n_layers=1), SplitAttention)  # the layers of a model have the same size
    one_layer = count_parameters(model.layers)
    assert count_parameters(model) + (config.n_layers - 1) * one_layer == size
    if hf["model_type"] == "internlm2":  # which transformers has not
        return
    # With every default written out, as transformers 5 saves it, the file reads the same.
    full_config = tiny.transformers.AutoConfig.for_model(**hf).to_json_string(use_diff=False)
    assert read(json.loads(full_config)) == read(hf)


@pytest.mark.parametrize("name", refused_configs.REFUSED)
def test_published_configs_that_are_not_implemented_are_refused_for_the_reason(name):
    hf, reason = refused_configs.REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        read(hf)


@pytest.mark.parametrize(
    "rope_parameters",
    [LLAMA3_ROPE, YARN_ROPE, LINEAR_ROPE, {"rope_type": "default", "rope_theta": 5e5}],
    ids=lambda parameters: parameters["rope_type"],
)
def test_an_exported_config_of_transformers_5_has_the_rope_of_transformers_4_as_well(tmp_path, rope_parameters):
    """transformers 4 ignores rope_parameters, without a warning."""
    hf_model = tiny.llama(rope_parameters=dict(rope_parameters), head_dim=32)
    source = tiny.save_with(hf_model, tmp_path / "source")
    run_ranks(1, saving.save, tiny.ours(source), tmp_path / "out", source, torch.float32)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rope_theta"] == rope_parameters["rope_theta"]
    legacy = {name: value for name, value in saved.items() if name != "rope_parameters"}
    assert read(legacy).ropes == read(saved).ropes == read(json.loads((source / "config.json").read_text())).ropes
    again = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = tiny.their_logits(hf_model, tiny.tokens(40))
    torch.testing.assert_close(tiny.their_logits(again, tiny.tokens(40)), expected, rtol=0, atol=0)


def test_a_gpt_neox_of_transformers_5_is_exported_with_its_own_names_of_transformers_4(tmp_path):
    """Which takes rotary_emb_base and rotary_pct, whatever rope_theta and partial_rotary_factor are."""
    source = tiny.save_with(tiny.causal_lm("gpt_neox", rotary_pct=0.5, rotary_emb_base=70), tmp_path / "source")
    run_ranks(1, saving.save, tiny.ours(source), tmp_path / "out", source, torch.float32)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rotary_emb_base"] == 70 and saved["rotary_pct"] == 0.5
    assert read({name: value for name, value in saved.items() if name != "rope_parameters"}) == read(saved)


def test_a_model_for_long_texts_has_one_list_of_factors_and_is_saved_with_it(tmp_path):
    """transformers takes the long list for long texts alone; a reward would depend on the batch."""
    settings = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 512}
    hf_model = tiny.reward_model("phi3", **settings)
    source, long_text, short_text = tiny.save_with(hf_model, tmp_path / "m"), tiny.tokens(300), tiny.tokens(50)

    def reward(model, tokens):
        with torch.no_grad():
            return model.rewards(pack(made.pair_examples([(tokens.tolist(), tokens.tolist()[:-1])]), np.arange(1)))[0]

    with dist.session(seed=0):
        short, long = (build.build(RewardModel, source, FP32, max_length=length) for length in (64, 65))
        for model in (short, long):
            build.load(model, source)
        saving.save(long, tmp_path / "out", source, torch.float32)
    assert_close(reward(short, short_text), their_reward(hf_model, short_text))
    assert_close(reward(long, long_text), their_reward(hf_model, long_text))
    assert gap(reward(long, short_text), their_reward(hf_model, short_text)) > 1e-3
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    again = tiny.ours(tmp_path / "out", RewardModel)
    for text in (short_text, long_text):
        assert_close(reward(long, text), their_reward(exported, text))
        assert torch.equal(reward(long, text), reward(again, text))


def test_both_spellings_of_rope_are_read():
    def rope(**settings):
        return read(LLAMA_HF | settings).ropes[0]

    plain, slower = rope(), rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert plain == rope(rope_theta=1e4) == rope(rope_parameters=None, rope_scaling=None) != slower
    assert slower == rope(rope_theta=5e5, rope_scaling=None) == rope(rope_theta=5e5, rope_scaling={"type": "default"})
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    assert rope(rope_theta=5e5, rope_scaling=scaling) == rope(rope_parameters=LLAMA3_ROPE) != slower


def test_attention_types_set_the_window_of_each_gpt_neo_layer():
    assert read(GPT_NEO_HF).windows == (0, 256, 0, 256)
    assert read(GPT_NEO_HF | {"attention_types": [[["local"], 4]], "window_size": 8}).windows == (8,) * 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_qwen_are_off_unless_use_sliding_window_is_set(model_type):
    hf = LLAMA_HF | {"model_type": model_type, "sliding_window": 8, "max_window_layers": 1}
    assert read(hf).windows == (0, 0)
    assert read(hf | {"use_sliding_window": True}).windows == (0, 8)
    assert read(hf | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}).windows == (
        8,
        0,
    )


def test_dropout_settings_change_nothing():
    assert read(LLAMA_HF | {"attention_dropout": 0.1}) == read(LLAMA_HF)
    assert read(GPT_NEO_HF | {"resid_dropout": 0.1, "embed_dropout": 0.2}) == read(GPT_NEO_HF)


@pytest.mark.parametrize(
    "hf, message",
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported, only exaone, exaone4, gemma, "),
        ({}, "model_type None is not supported"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "model_type 'gpt_oss' is not"),
        (LLAMA_HF | {"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not implemented"),
        (LLAMA_HF | {"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers describe 1 layers"),
        (LLAMA_HF | {"model_type": "smollm3", "layer_types": ["sliding_attention"] * 2}, "need use_sliding_window"),
        (LLAMA_HF | {"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm True is not implemented"),
        (LLAMA_HF | {"hidden_act": "mish"}, "hidden_act 'mish' is not implemented, only 'silu' or"),
        (LLAMA_HF | {"rope_scaling": {"type": "ntk", "factor": 2}}, "rope_scaling of type 'ntk'"),
        (LLAMA_HF | {"is_causal": False}, "is_causal False is not implemented, only True"),
        (LLAMA_HF | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling of type 'llama3' lacks 'factor'"),
        (LLAMA_HF | {"rope_parameters": {"rope_type": "longrope"}}, "rope_scaling of type 'longrope'"),
        (LLAMA_HF | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA_HF | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        (LLAMA_HF | {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (LLAMA_HF | {"head_dim": 7}, "rotate 7 dimensions of each head .head_dim 7."),
        (
            LLAMA_HF | {"model_type": "qwen3", "layer_types": ["full_attention", "chunked"]},
            r"layer_types\[1\] 'chunked' is not implemented",
        ),
        (LLAMA_HF | {"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types describe 1 layers"),
        (LLAMA_HF | {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_scaling of type 'longrope'"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": YARN_ROPE}, "'longrope' needs short_factor and long_factor"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "has 1 factors for 4"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": LONGROPE | {"short_factor": ["1"]}}, "short_factor.0. '1'"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear'"),
        (GPT2_HF | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT_NEO_HF | {"activation_function": "mish"}, "activation_function 'mish'"),
        (
            GPT_NEO_HF | {"attention_types": [[["global", "sparse"], 2]]},
            r"attention_types \[\['global', 'sparse'\], 2\]",
        ),
        (GPT_NEO_HF | {"num_layers": 6}, "attention_types describe 4 layers, num_layers is 6"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_setting_name(hf, message):
    with pytest.raises(ValueError, match=message):
        read(hf)
