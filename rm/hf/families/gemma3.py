"""Gemma 3 without images: a Gemma with norms before and behind attention and MLP, norms on q and k, and five layers
with a window, which rotate faster, to each without. `model_type` "gemma3_text".

Gemma 2 is not implemented: it caps attention's logits, which no fused attention kernel of torch does.
"""

from dataclasses import replace

from rm.hf.families import gemma, llama
from rm.hf.families.rope import rope
from rm.hf.families.rules import only, windows
from rm.model.transformer import ModelConfig

DEFAULTS = gemma.DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 131072}


def config(hf: dict) -> ModelConfig:
    for setting in ("attn_logit_softcapping", "final_logit_softcapping"):
        only(hf, setting, None)
    only(hf, "hidden_activation", "gelu_pytorch_tanh")
    hf = DEFAULTS | hf
    layers, head_dim = hf["num_hidden_layers"], hf["head_dim"]
    period = hf.get("sliding_window_pattern") or 6
    kinds = hf.get("layer_types") or [
        "full_attention" if i % period == 0 else "sliding_attention" for i in range(1, layers + 1)
    ]
    sees = hf.get("sliding_window", 4096)

    scalings = {"rope_scaling": None, "rope_parameters": None}
    asked = hf.get("rope_parameters") or {}
    whole = {"rope_parameters": (hf.get("rope_scaling") or {}) | (asked.get("full_attention") or {})}
    near = {"rope_parameters": asked.get("sliding_attention"), "rope_theta": hf.get("rope_local_base_freq")}
    turning = {
        "full_attention": rope(hf | scalings | whole, head_dim, theta=1e6),
        "sliding_attention": rope(hf | scalings | near, head_dim, theta=1e4),
    }
    return replace(
        gemma.like_gemma(hf | scalings),
        block="sandwich",
        qk_norm=True,
        attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        windows=windows({"layer_types": kinds, "sliding_window": sees}, layers),
        ropes=tuple(turning[kind] for kind in kinds),
    )


FAMILY = replace(
    llama.FAMILY,
    config=config,
    modules=llama.FAMILY.modules
    | {
        "model.layers.{}.self_attn.q_norm": "layers.{}.attn.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attn.k_norm",
        "model.layers.{}.post_attention_layernorm": "layers.{}.attn_post_norm",
        "model.layers.{}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
    },
    classes={"lm": "Gemma3ForCausalLM", "reward": "Gemma3TextForSequenceClassification"},
)
