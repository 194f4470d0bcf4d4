"""Every family computes what transformers computes, and refuses what it does not implement."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rm.data import batch
from rm.data.batch import pack
from rm.distributed import process_group as dist
from rm.hf import adapter, build, families, weights
from rm.model import lisa, lora
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.scoring import score
from rm.training import optim, step
from tests import made, real_configs, tiny
from tests.model.test_lora import Settings
from tests.ranks import run_ranks

FAMILIES = sorted(tiny.SETTINGS)
LLAMA_HF = tiny.LLAMA | {"model_type": "llama"}
QWEN3_HF = tiny.LLAMA | {"model_type": "qwen3"}
GPT2_HF = tiny.SETTINGS["gpt2"] | {"model_type": "gpt2"}
GPT_NEO_HF = tiny.GPT_NEO | {"model_type": "gpt_neo"}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 5e5,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
CASES = [
    ("gemma", "untied", {"tie_word_embeddings": False}),
    ("gemma3_text", "linear rope", {"rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": None}}),
    ("gpt2", "untied, narrow", {"tie_word_embeddings": False, "n_inner": 40}),
    ("gpt_neox", "serial, other activation", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    ("gpt_neox", "whole heads, no biases, tied", {"attention_bias": False, "tie_word_embeddings": True}
     | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0}}),
    ("phi3", "no window", {"sliding_window": None}),
    ("phi3", "partial rope", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("llama", "grouped queries", {"num_key_value_heads": 2}),
    ("llama", "one kv head, tied", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "wide heads", {"head_dim": 24}),
    ("llama", "other frequencies", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", "epsilon", {"rms_norm_eps": 1e-2}),
    ("llama", "llama 3 rope", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    ("llama", "linear rope", {"rope_parameters": LINEAR_ROPE}),
    ("llama", "yarn rope", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    ("gpt_neo", "untied, narrow", {"tie_word_embeddings": False, "intermediate_size": 40}),
    ("gpt_neo", "other windows", {"attention_types": [[["global"], 1], [["local"], 3]], "window_size": 7}),
    ("mistral", "no window, wide heads", {"sliding_window": None, "head_dim": 24}),
    ("qwen2", "no window, tied", {"use_sliding_window": False, "tie_word_embeddings": True}),
    ("qwen2", "every layer a window", {"max_window_layers": 0}),
    ("qwen3", "biases, windows", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}
     | {"max_window_layers": 1, "tie_word_embeddings": False}),
]  # fmt: skip
CASES = [(family, "plain", {}) for family in FAMILIES] + CASES
in_every_case = pytest.mark.parametrize(
    "family, settings",
    [(family, settings) for family, _, settings in CASES],
    ids=[f"{f} {name}" for f, name, _ in CASES],
)
in_every_family = pytest.mark.parametrize("family", FAMILIES)


def read(hf):
    return families.find(hf).config(hf)


def gap(ours, theirs):
    """The largest, over the largest value where that is more than one."""
    return (ours - theirs).abs().max().item() / max(1, theirs.abs().max().item())


def same(ours, theirs):
    assert gap(ours, theirs) <= 1e-5


@torch.no_grad()
def their_reward(model, tokens):
    return model(torch.as_tensor(tokens)[None]).logits[0, 0]


# What it computes


@in_every_case
def test_logits_are_those_of_transformers_within_and_beyond_every_window(tmp_path, family, settings):
    theirs = tiny.causal_lm(family, **settings)
    model = tiny.ours(tiny.save_with(theirs, tmp_path / "m"))
    for length in (1, 50, 300):
        tokens = tiny.tokens(length)
        same(tiny.logits(model, tokens), tiny.their_logits(theirs, tokens))


@in_every_family
def test_in_bfloat16_the_logits_are_as_close_to_those_of_float32_as_those_of_transformers(tmp_path, family):
    theirs, tokens = tiny.causal_lm(family), tiny.tokens(200)
    folder = tiny.save_with(theirs, tmp_path / "m")
    exact = tiny.their_logits(theirs, tokens)
    off = (tiny.their_logits(theirs.bfloat16(), tokens).float() - exact).norm()
    ours = (tiny.logits(tiny.ours(folder, dtype=torch.bfloat16), tokens).float() - exact).norm()
    assert 0 < ours < 1.2 * off


@in_every_case
def test_rewards_of_packed_pairs_are_those_that_transformers_gives_each_text(tmp_path, family, settings):
    theirs = tiny.reward_model(family, **settings)
    model = tiny.ours(tiny.save_with(theirs, tmp_path / "m"), RewardModel)
    pairs = made.token_pairs(6, longest=40)
    with torch.no_grad():
        ours = model.rewards(pack(made.pair_examples(pairs), np.arange(6)))
    same(ours, torch.stack([their_reward(theirs, text) for pair in pairs for text in pair]))


def test_positions_far_out_turn_as_those_of_transformers():
    """Angles are fp32 products there: at position 100,000 the last bit of a frequency would show."""
    for rope in ({"rope_type": "default", "rope_theta": 5e5}, LLAMA3_ROPE, YARN_ROPE, LINEAR_ROPE):
        theirs = tiny.llama(rope_parameters=dict(rope), head_dim=64).model.rotary_emb
        (ours, *_) = read(LLAMA_HF | {"rope_parameters": rope, "head_dim": 64}).ropes
        assert torch.equal(torch.tensor(ours.frequencies), theirs.inv_freq)
        assert ours.scale == theirs.attention_scaling


def test_the_window_of_gpt_neo_is_what_makes_the_difference_beyond_it(tmp_path):
    local, everywhere = (
        tiny.ours(tiny.save_with(tiny.gpt_neo(attention_types=[[[kind], 4]]), tmp_path / kind))
        for kind in ("local", "global")
    )
    tokens = tiny.tokens(300)
    gap = (tiny.logits(local, tokens) - tiny.logits(everywhere, tokens)).abs().amax(-1)
    assert gap[:256].max() < 1e-5 < 1e-2 < gap[260:].min()


# What it learns


def losses_of_texts(model, theirs):
    """Summed cross entropy of the same texts: ours in one packed row, theirs text by text."""
    texts = [chosen for chosen, _ in made.token_pairs(4, longest=30)]
    ours = model(pack(made.text_examples(texts), np.arange(4)))["loss"]
    theirs = [
        cross_entropy(theirs(text[None]).logits[0, :-1], text[1:], reduction="sum") for text in map(torch.tensor, texts)
    ]
    return ours, sum(theirs)


def losses_of_pairs(model, theirs):
    """Summed Bradley-Terry losses of the same pairs: ours in one row with shared prefixes, theirs text by text."""
    pairs = made.token_pairs(4, longest=30)
    ours = model(pack(made.pair_examples(pairs), np.arange(4)))["loss"]
    rewards = [[theirs(torch.tensor(text)[None]).logits[0, 0] for text in pair] for pair in pairs]
    return ours, sum(-logsigmoid(chosen - rejected) for chosen, rejected in rewards)


def gradient_gaps(folder, model, theirs, loss, their_loss):
    """Relative gap of the gradient of every parameter of theirs, against ours put together in its layout."""
    same(loss.detach(), their_loss.detach())
    loss.backward()
    their_loss.backward()
    config, family, _ = weights.read_config(folder)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    seen, gaps = set(), {}
    for name, parameter in theirs.named_parameters():
        parts = family.ours(name)
        seen.update(parts)
        joined = family.layout(name).join([ours[part] for part in parts], config.n_kv_heads)
        gaps[name] = ((joined - parameter.grad).norm() / (parameter.grad.norm() + 0.1)).item()
    assert seen == ours.keys()
    return gaps


@in_every_family
def test_packed_rows_give_the_gradients_that_transformers_gives_text_by_text(tmp_path, family):
    lm, rm = tiny.causal_lm(family), tiny.reward_model(family)
    for theirs, head, losses in ((lm, LanguageModel, losses_of_texts), (rm, RewardModel, losses_of_pairs)):
        folder = tiny.save_with(theirs, tmp_path / head.__name__)
        model = tiny.ours(folder, head)
        gaps = gradient_gaps(folder, model, theirs, *losses(model, theirs))
        assert max(gaps.values()) <= 1e-5, gaps


WAYS = {
    "LoRA": {"lora_target_modules": ("q_proj", "v_proj", "down_proj")},
    "LISA": {"use_lora": False, "use_lisa": True, "lisa_activated_layers": 1, "lisa_interval_steps": 1},
}


def train(folder):
    """Way -> losses and gradient norms of two steps of a reward model, and scores after them."""
    found = {}
    for way, flags in WAYS.items():
        settings = Settings(model_name_or_path=str(folder), **flags)
        model = build.load(RewardModel, settings)
        optimizer = optim.adamw(model, settings)
        loader = batch.Loader(made.pair_examples(made.token_pairs(12)), settings, 0, model.config.attention_cost)
        lines = []
        for s in range(2):
            lisa.switch(model, optimizer, s, settings)
            work = loader.at(s)
            sums = step.train_step(model, optimizer, work, settings.max_grad_norm)
            lines.append([dist.sum_over_ranks(sums["loss"].clone()) / work.examples, sums["grad_norm"]])
        rows = batch.EvalBatches(made.pair_examples(made.token_pairs(5, seed=9)), settings)
        found[way] = torch.tensor(lines), score.all_rewards(model, rows)
    return found


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "gpt_neox", "qwen3"])  # one of each shape
def test_two_ranks_train_as_one_with_lora_and_with_lisa(tmp_path, family):
    folder = tiny.save_with(tiny.causal_lm(family), tmp_path / "m")
    (one,), many = run_ranks(1, train, folder), run_ranks(2, train, folder)
    for way, (lines, scores) in one.items():
        for other_lines, other_scores in (found[way] for found in many):
            torch.testing.assert_close(other_lines, lines, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other_scores, scores, rtol=1e-3, atol=1e-4)


@in_every_family
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")], ids=" ".join)
def test_adapters_are_to_peft_and_merged_to_transformers_what_they_are_here(tmp_path, family, targets):
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
    ours = tiny.logits(model, tokens)
    with dist.session(seed=0):
        adapter.save(model, tmp_path / "adapter", str(source), settings, data)
        adapter.merge(model)
        weights.save(model, tmp_path / "merged", source, torch.float32)
    base, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "merged"))
    assert (ours - tiny.their_logits(base, tokens)).abs().max() > 0.1
    same(ours, tiny.their_logits(merged, tokens))
    same(ours, tiny.logits(tiny.ours(tmp_path / "adapter"), tokens))
    same(ours, tiny.their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), tokens))


# What is in its files


@pytest.mark.parametrize("name", ["value_head.weight", "v_head.weight", "v_head.summary.weight"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_heads_of_other_trainers_reward_models_are_known_and_saved_as_score(tmp_path, family, name):
    """As OpenRLHF (once) and TRL call them."""
    theirs = tiny.reward_model(family)
    source = tiny.save_with(theirs, tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors.pop("score.weight")
    save_file(tensors, source / "model.safetensors")
    model = tiny.ours(source, RewardModel)
    assert torch.equal(model.score.weight, theirs.score.weight)
    with dist.session(seed=0):
        weights.save(model, tmp_path / "out", source, torch.float32)
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")


@in_every_case
@pytest.mark.parametrize("head", [LanguageModel, RewardModel])
def test_what_is_loaded_and_saved_is_the_same_file_and_opens_in_transformers(tmp_path, family, settings, head):
    make, auto = {
        LanguageModel: (tiny.causal_lm, AutoModelForCausalLM),
        RewardModel: (tiny.reward_model, AutoModelForSequenceClassification),
    }[head]
    source = tiny.save_with(make(family, **settings), tmp_path / "m")
    with dist.session(seed=0):
        weights.save(tiny.ours(source, head), tmp_path / "out", source, torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert opened.config.architectures == [type(make(family, **settings)).__name__]


@in_every_case
def test_the_key_table_reads_the_same_in_both_directions(family, settings):
    hf = tiny.transformers.AutoConfig.for_model(family, **(tiny.SETTINGS[family] | settings)).to_dict()
    family = families.find(hf)
    with torch.device("meta"):
        names = {
            name
            for head in (LanguageModel, RewardModel)
            for name, _ in head(read(hf), SplitAttention).named_parameters()
        }
    for name in names:
        assert name in family.ours(family.theirs(name))
        bare = family.theirs(name).removeprefix(family.prefix)  # as a model without a head calls it
        assert name in family.ours(bare)


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
def test_tables_that_old_checkpoints_hold_are_ignored(hf, name):
    assert families.find(hf).ignores(name)
    assert families.find(hf).ours(name) == []
    assert not families.find(hf).ignores(name + "es")


# How its config.json reads


@pytest.mark.parametrize("name", real_configs.CONFIGS)
def test_published_models_have_their_published_size_and_read_as_transformers_reads_them(name):
    hf, size = real_configs.CONFIGS[name]
    with torch.device("meta"):
        model = LanguageModel(read(hf), SplitAttention)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    theirs = tiny.transformers.AutoConfig.for_model(**hf)  # with every default spelled out, as transformers 5 saves it
    spelled_out = read(json.loads(theirs.to_json_string(use_diff=False)))
    assert spelled_out == read(hf)


def test_both_spellings_of_rope_are_read():
    def rope(**settings):
        return read(LLAMA_HF | settings).ropes[0]

    plain, slower = rope(), rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert plain == rope(rope_theta=1e4) == rope(rope_parameters=None, rope_scaling=None) != slower
    assert slower == rope(rope_theta=5e5, rope_scaling=None) == rope(rope_theta=5e5, rope_scaling={"type": "default"})
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    assert rope(rope_theta=5e5, rope_scaling=scaling) == rope(rope_parameters=LLAMA3_ROPE) != slower


def test_attention_types_say_how_far_each_layer_sees():
    assert read(GPT_NEO_HF).windows == (0, 256, 0, 256)
    assert read(GPT_NEO_HF | {"attention_types": [[["local"], 4]], "window_size": 8}).windows == (8,) * 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_the_windows_of_qwen_are_off_unless_asked_for(model_type):
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
        ({"model_type": "bert"}, "model_type 'bert' is not supported, only gemma, gemma3_text, gpt2, "),
        ({}, "model_type None is not supported"),
        (LLAMA_HF | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented, only 'silu' or"),
        (LLAMA_HF | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling of type 'dynamic'"),
        (LLAMA_HF | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling of type 'llama3' lacks 'factor'"),
        (LLAMA_HF | {"rope_parameters": {"rope_type": "longrope"}}, "rope_scaling of type 'longrope'"),
        (LLAMA_HF | {"rope_parameters": YARN_ROPE | {"mscale": 1.0}}, "'yarn' with mscale"),
        (LLAMA_HF | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA_HF | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        (LLAMA_HF | {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (LLAMA_HF | {"head_dim": 7}, "7 of head_dim 7 would rotate"),
        (
            LLAMA_HF | {"model_type": "qwen3", "layer_types": ["full_attention", "chunked"]},
            r"layer_types \['chunked'\]",
        ),
        (LLAMA_HF | {"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types describe 1 layers"),
        (LLAMA_HF | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        (LLAMA_HF | {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_scaling of type 'longrope'"),
        (LLAMA_HF | {"model_type": "phi3", "rope_scaling": YARN_ROPE}, "rope_scaling of type 'yarn'"),
        (GPT2_HF | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT_NEO_HF | {"activation_function": "relu"}, "activation_function 'relu'"),
        (GPT_NEO_HF | {"attention_types": [[["global", "sparse"], 2]]}, r"attention_types \['sparse'\]"),
        (GPT_NEO_HF | {"num_layers": 6}, "attention_types describe 4 layers, num_layers says 6"),
    ],
)
def test_a_setting_that_is_not_implemented_is_named(hf, message):
    with pytest.raises(ValueError, match=message):
        read(hf)
