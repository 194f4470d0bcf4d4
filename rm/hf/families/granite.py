"""Granite 3: a LLaMA whose embeddings, attention logits, residual additions and logits are each multiplied by a number.
`model_type` "granite".

transformers has no class for a reward model of it: docs/exports.md says how one is opened.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import NUMBER, POSITIVE
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    return replace(
        llama.config(hf),
        block="scaled",
        embed_scale=hf.get("embedding_multiplier", 1.0),
        attn_scale=hf.get("attention_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logit_scale=1 / hf.get("logits_scaling", 1.0),
    )


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS
    | {
        "embedding_multiplier": NUMBER,
        "attention_multiplier": NUMBER,
        "residual_multiplier": NUMBER,
        "logits_scaling": POSITIVE,
    },
    config=config,
    classes={"lm": "GraniteForCausalLM", "reward": "GraniteForSequenceClassification"},
    other_classes=("GraniteModel",),
)
