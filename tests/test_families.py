"""Every family computes what transformers computes, and refuses what it does not implement."""

import pytest
import torch

from rm import families
from rm.attention import SplitAttention
from rm.heads import LanguageModel
from tests import tiny

LLAMA_HF = tiny.LLAMA | {"model_type": "llama"}
GPT_NEO_HF = tiny.GPT_NEO | {"model_type": "gpt_neo"}


def read(hf):
    return families.find(hf).config(hf)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-2},
    ],
    ids=["plain", "grouped queries", "one kv head, tied", "biases", "wide heads", "other frequencies"],
)
def test_llama_gives_the_logits_of_transformers(tmp_path, settings):
    theirs = tiny.llama(**settings)
    model = tiny.ours(tiny.save_with(theirs, tmp_path / "m"))
    for length in (1, 64):
        tokens = tiny.tokens(length)
        torch.testing.assert_close(tiny.logits(model, tokens), tiny.their_logits(theirs, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False, "intermediate_size": 40},
        {"attention_types": [[["global"], 1], [["local"], 3]], "window_size": 7},
    ],
    ids=["plain", "untied, narrow", "other windows"],
)
def test_gpt_neo_gives_the_logits_of_transformers_within_and_beyond_its_window(tmp_path, settings):
    theirs = tiny.gpt_neo(**settings)
    model = tiny.ours(tiny.save_with(theirs, tmp_path / "m"))
    for length in (1, 50, 400):
        tokens = tiny.tokens(length)
        torch.testing.assert_close(tiny.logits(model, tokens), tiny.their_logits(theirs, tokens), atol=1e-5, rtol=0)


def test_the_window_of_gpt_neo_is_what_makes_the_difference_beyond_it(tmp_path):
    local, everywhere = (
        tiny.ours(tiny.save_with(tiny.gpt_neo(attention_types=[[[kind], 4]]), tmp_path / kind))
        for kind in ("local", "global")
    )
    tokens = tiny.tokens(300)
    gap = (tiny.logits(local, tokens) - tiny.logits(everywhere, tokens)).abs().amax(-1)
    assert gap[:256].max() < 1e-5 < 1e-2 < gap[260:].min()


@pytest.mark.parametrize("hf", [LLAMA_HF | {"attention_bias": True, "mlp_bias": True}, GPT_NEO_HF])
@pytest.mark.parametrize("tied", [True, False])
def test_the_key_table_reads_the_same_in_both_directions(hf, tied):
    family = families.find(hf)
    config = family.config(hf | {"tie_word_embeddings": tied})
    with torch.device("meta"):
        names = [name for name, _ in LanguageModel(config, SplitAttention).named_parameters()]
    assert [family.ours(family.theirs(name)) for name in names] == names
    assert family.ours(family.theirs("score.weight")) == "score.weight"
    bare = [family.theirs(name).removeprefix(family.prefix) for name in names]
    assert [family.ours(name) for name in bare] == names  # as a model without a head calls them


@pytest.mark.parametrize(
    "hf, name",
    [
        (LLAMA_HF, "model.layers.11.self_attn.rotary_emb.inv_freq"),
        (GPT_NEO_HF, "transformer.h.3.attn.attention.masked_bias"),
        (GPT_NEO_HF, "h.3.attn.attention.bias"),
    ],
)
def test_tables_that_old_checkpoints_hold_are_ignored(hf, name):
    assert families.find(hf).ignores(name)
    assert families.find(hf).ours(name) is None
    assert not families.find(hf).ignores(name + "es")


def test_both_spellings_of_the_rotary_base_are_read():
    assert read(LLAMA_HF).rope_theta == 10000
    assert read(LLAMA_HF | {"rope_theta": 5e5, "rope_scaling": None}).rope_theta == 5e5
    assert read(LLAMA_HF | {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}).rope_theta == 5e5
    assert read(LLAMA_HF | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta == 7


def test_attention_types_say_how_far_each_layer_sees():
    assert read(GPT_NEO_HF).windows == (0, 256, 0, 256)
    assert read(GPT_NEO_HF | {"attention_types": [[["local"], 4]], "window_size": 8}).windows == (8,) * 4


def test_dropout_settings_change_nothing():
    assert read(LLAMA_HF | {"attention_dropout": 0.1}) == read(LLAMA_HF)
    assert read(GPT_NEO_HF | {"resid_dropout": 0.1, "embed_dropout": 0.2}) == read(GPT_NEO_HF)


@pytest.mark.parametrize(
    "hf, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only gpt_neo, llama"),
        ({}, "model_type None is not supported"),
        (LLAMA_HF | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented, only 'silu'"),
        (LLAMA_HF | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'linear'"),
        (LLAMA_HF | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling of type 'llama3'"),
        (LLAMA_HF | {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling of type 'yarn'"),
        (LLAMA_HF | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA_HF | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        (LLAMA_HF | {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (LLAMA_HF | {"head_dim": 7}, "head_dim 7 is odd"),
        (GPT_NEO_HF | {"activation_function": "relu"}, "activation_function 'relu'"),
        (GPT_NEO_HF | {"attention_types": [[["global", "sparse"], 2]]}, r"attention_types \['sparse'\]"),
        (GPT_NEO_HF | {"num_layers": 6}, "attention_types describe 4 layers, num_layers says 6"),
    ],
)
def test_a_setting_that_is_not_implemented_is_named(hf, message):
    with pytest.raises(ValueError, match=message):
        read(hf)
