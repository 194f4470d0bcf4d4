"""Mistral: a LLaMA with a sliding window in all layers or, from version 0.2 on, in none. `model_type` "mistral".

With `layer_types`, only some layers have the window: transformers makes a "ministral" of such a file.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import LENGTH, OFF
from rm.hf.families.rules import LAYER_TYPES, windows
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    like_llama = llama.config({"num_key_value_heads": 8, "max_position_embeddings": 131072} | hf)
    layers = like_llama.n_layers
    by_layer = {"layer_types": ["sliding_attention"] * layers, "sliding_window": 4096} | hf
    return replace(like_llama, windows=windows(by_layer, layers))


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS | {"sliding_window": LENGTH, "layer_types": LAYER_TYPES, "attention_bias": OFF, "mlp_bias": OFF},
    config=config,
    classes={"lm": "MistralForCausalLM", "reward": "MistralForSequenceClassification"},
    other_classes=("MistralModel", "EurusRewardModel"),
)
