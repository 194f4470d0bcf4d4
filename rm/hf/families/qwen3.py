"""Qwen 3, dense: a LLaMA with an RMSNorm on each head's q and k, and optional windows. `model_type` "qwen3"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import OFF
from rm.hf.families.qwen2 import DEFAULTS, WINDOW_KEYS, upper_windows
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    return replace(llama.config(DEFAULTS | {"head_dim": 128} | hf), qk_norm="head", windows=upper_windows(hf))


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS | WINDOW_KEYS | {"mlp_bias": OFF},
    config=config,
    modules=llama.FAMILY.modules
    | {
        "model.layers.{}.self_attn.q_norm": "layers.{}.attn.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attn.k_norm",
    },
    classes={"lm": "Qwen3ForCausalLM", "reward": "Qwen3ForSequenceClassification"},
    other_classes=("Qwen3Model",),
)
