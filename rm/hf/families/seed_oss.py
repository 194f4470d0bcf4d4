"""Seed-OSS: a LLaMA with a bias on q, k and v, and one of the output that is set apart. `model_type` "seed_oss"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import FLAG
from rm.model.transformer import ModelConfig

DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 524288}


def config(hf: dict) -> ModelConfig:
    return replace(llama.config(DEFAULTS | hf), out_bias=hf.get("attention_out_bias", False))


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS | {"attention_out_bias": FLAG},
    config=config,
    classes={"lm": "SeedOssForCausalLM", "reward": "SeedOssForSequenceClassification"},
    other_classes=("SeedOssModel",),
)
