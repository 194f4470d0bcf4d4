"""Mistral: a LLaMA whose layers see a window, all of them or (from version 0.2 on) none. `model_type` "mistral"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.rules import only
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    only(hf, "layer_types", None)  # another model_type's, in transformers
    read = llama.config({"num_key_value_heads": 8, "max_position_embeddings": 131072} | hf)
    return replace(read, windows=(hf.get("sliding_window", 4096) or 0,) * read.n_layers)


FAMILY = replace(
    llama.FAMILY, config=config, classes={"lm": "MistralForCausalLM", "reward": "MistralForSequenceClassification"}
)
