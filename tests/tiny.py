"""Tiny models of transformers with random weights, and the same models loaded by this package (`ours`)."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rm.hf import weights
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel

transformers = pytest.importorskip("transformers")
from transformers.modeling_layers import GenericForSequenceClassification  # noqa: E402
from transformers.models.granite.modeling_granite import GranitePreTrainedModel  # noqa: E402
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (  # noqa: E402
    GraniteMoeHybridPreTrainedModel,
)

LLAMA = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
GPT_NEO = dict(
    vocab_size=99,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    max_position_embeddings=512,
    attention_types=[[["global", "local"], 2]],
    bos_token_id=98,
    eos_token_id=98,
)
WINDOW = 7
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LONG_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.1}
HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

# model_type -> a config.json that uses what is special about the family
SETTINGS = {
    "exaone4": LLAMA
    | dict(num_key_value_heads=2, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "gemma": LLAMA | dict(num_key_value_heads=1, head_dim=16, pad_token_id=None),
    "gemma2": LLAMA
    | dict(num_key_value_heads=2, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=10, pad_token_id=None)
    | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": LLAMA
    | dict(num_key_value_heads=2, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=10)
    | dict(layer_types=["sliding_attention", "full_attention"], pad_token_id=None),
    "glm4": LLAMA | dict(num_key_value_heads=2, head_dim=16, pad_token_id=None),
    "gpt2": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=98, eos_token_id=98),
    "gpt_neo": GPT_NEO,
    "gpt_neox": LLAMA | dict(rotary_pct=0.5),
    "granite": LLAMA
    | dict(num_key_value_heads=2, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.6)
    | dict(logits_scaling=4.0),
    "granitemoehybrid": LLAMA
    | dict(num_key_value_heads=2, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.6)
    | dict(logits_scaling=4.0, num_local_experts=0, shared_intermediate_size=40, position_embedding_type="rope")
    | dict(layer_types=["full_attention"] * 2, mamba_n_heads=4),
    "llama": LLAMA,
    "ministral": LLAMA
    | dict(num_key_value_heads=2, sliding_window=WINDOW, head_dim=16)
    | dict(layer_types=["full_attention", "sliding_attention"]),
    "ministral3": LLAMA
    | dict(num_key_value_heads=2, head_dim=32, sliding_window=WINDOW, pad_token_id=None)
    | dict(rope_parameters=dict(LONG_YARN)),
    "mistral": LLAMA | dict(num_key_value_heads=2, sliding_window=WINDOW),
    "olmo2": LLAMA | dict(num_key_value_heads=2, pad_token_id=None),
    "olmo3": LLAMA
    | dict(num_key_value_heads=2, head_dim=32, sliding_window=WINDOW, pad_token_id=None)
    | dict(layer_types=["sliding_attention", "full_attention"])
    | dict(rope_parameters={"full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": None}),
    "phi3": LLAMA | dict(num_key_value_heads=2, sliding_window=WINDOW, pad_token_id=None),
    "qwen2": LLAMA | dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": LLAMA | dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "seed_oss": LLAMA | dict(num_key_value_heads=2, head_dim=16, attention_out_bias=True, pad_token_id=None),
    "smollm3": LLAMA
    | dict(num_key_value_heads=2, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW)
    | dict(pad_token_id=None),
    "stablelm": LLAMA | dict(num_key_value_heads=2, use_qkv_bias=True, rope_parameters=HALF_ROPE),
    "starcoder2": LLAMA | dict(num_key_value_heads=2, sliding_window=WINDOW),
}


class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
    """As transformers makes it for its other families."""


class GraniteMoeHybridForSequenceClassification(GenericForSequenceClassification, GraniteMoeHybridPreTrainedModel):
    """The same."""


for _config, _model in (
    (transformers.GraniteConfig, GraniteForSequenceClassification),
    (transformers.GraniteMoeHybridConfig, GraniteMoeHybridForSequenceClassification),
):
    transformers.AutoModelForSequenceClassification.register(_config, _model, exist_ok=True)
# What makes a model of the family's defaults in transformers one that is implemented here.
DENSE = {"granitemoehybrid": {"num_local_experts": 0, "layer_types": ["full_attention"] * 32}}


def causal_lm(family: str, **settings):
    """A language model of transformers."""
    config = transformers.AutoConfig.for_model(family, **(SETTINGS[family] | settings))
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def reward_model(family: str, **settings):
    """A reward model of transformers."""
    config = transformers.AutoConfig.for_model(family, **(SETTINGS[family] | {"num_labels": 1} | settings))
    return spread(transformers.AutoModelForSequenceClassification.from_config(config))


llama = functools.partial(causal_lm, "llama")
gpt_neo = functools.partial(causal_lm, "gpt_neo")


@torch.no_grad()
def spread(model):
    """Randomize all parameters.

    As initialized by transformers, biases are zero, norms are one and attention is nearly uniform: many errors would
    not show.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(parameter + 0.1 * noise)
    return model.eval()


def save_with(model, folder: Path, **settings) -> Path:
    """Save a model of transformers, with settings of `save_pretrained`; returns the folder."""
    model.save_pretrained(folder, **settings)
    return folder


def ours(folder: Path, head: type = LanguageModel, dtype: torch.dtype = torch.float32):
    """Our model, loaded from a folder, not sharded; the folder must hold all its parameters."""
    config, *_ = weights.read_config(folder)
    model = head(config, SplitAttention).to(dtype)
    assert weights.load(model, folder) == set()
    return model


def tokens(length: int) -> Tensor:
    """(T,) random token ids; the same ids for the same length."""
    return torch.randint(0, 99, (length,), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """(T, V) logits of one sequence, by our model."""
    hidden = model.hidden(tokens, torch.arange(len(tokens)), [(0, len(tokens))])
    head = model.embed if model.config.tie_embeddings else model.lm_head
    logits, cap = hidden @ head.weight.T * model.config.logit_scale, model.config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def their_logits(model, tokens: Tensor) -> Tensor:
    """(T, V) logits of one sequence, by a model of transformers."""
    return model(tokens[None]).logits[0]
