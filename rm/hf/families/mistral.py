"""Mistral: a LLaMA with a sliding window in all layers or, from version 0.2 on, in none. `model_type` "mistral"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.rules import only
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    only(hf, "layer_types", None)  # in transformers, models with it have another model_type
    like_llama = llama.config({"num_key_value_heads": 8, "max_position_embeddings": 131072} | hf)
    return replace(like_llama, windows=(hf.get("sliding_window", 4096) or 0,) * like_llama.n_layers)


FAMILY = replace(
    llama.FAMILY, config=config, classes={"lm": "MistralForCausalLM", "reward": "MistralForSequenceClassification"}
)
