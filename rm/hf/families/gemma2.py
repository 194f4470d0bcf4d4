"""Gemma 2: a Gemma with norms before and after attention and MLP, a sliding window in every other layer, and capped
logits in attention and of the language model. `model_type` "gemma2".
"""

from dataclasses import replace

from rm.hf.families import gemma, llama
from rm.hf.families.keys import AT_LEAST_1, LENGTH, NUMBER
from rm.hf.families.rules import LAYER_TYPES, every_nth_full, windows
from rm.model.transformer import ModelConfig

DEFAULTS = gemma.DEFAULTS | {"num_key_value_heads": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
KEYS = gemma.KEYS | {
    "query_pre_attn_scalar": AT_LEAST_1,
    "attn_logit_softcapping": NUMBER,
    "final_logit_softcapping": NUMBER,
    "sliding_window": LENGTH,
    "sliding_window_size": LENGTH,  # without effect: the published files have both
    "layer_types": LAYER_TYPES,
}


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    layer_types = hf.get("layer_types") or every_nth_full(layers, 2)
    return replace(
        gemma.like_gemma(hf),
        block="sandwich",
        windows=windows({"layer_types": layer_types, "sliding_window": window}, layers),
        **scale_and_caps(hf),
    )


def scale_and_caps(hf: dict) -> dict:
    """The fields of `ModelConfig` for the scale and the caps of logits."""
    return {
        "attn_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "attn_softcap": hf.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": hf.get("final_logit_softcapping") or 0.0,
    }


FAMILY = replace(
    llama.FAMILY,
    keys=KEYS,
    config=config,
    modules=llama.FAMILY.modules
    | {
        "model.layers.{}.post_attention_layernorm": "layers.{}.attn_post_norm",
        "model.layers.{}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
    },
    classes={"lm": "Gemma2ForCausalLM", "reward": "Gemma2ForSequenceClassification"},
    other_classes=("Gemma2Model",),
)
