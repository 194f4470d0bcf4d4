"""Gemma 3, text only: a Gemma with norms before and after attention and MLP, norms on q and k, and five layers with a
sliding window, and a smaller rope base, to each layer with full attention. `model_type` "gemma3_text".

Gemma 2 is not implemented: it caps the attention logits, which no fused attention kernel of torch does.
"""

from dataclasses import replace

from rm.hf.families import gemma, llama
from rm.hf.families.keys import AT_LEAST_1, COUNT, LENGTH, ROPE
from rm.hf.families.rope import rope
from rm.hf.families.rules import LAYER_TYPES, windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = gemma.DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 131072}
ROPES = {"full_attention": Key(dict, keys=ROPE), "sliding_attention": Key(dict, keys=ROPE)}
KEYS = gemma.KEYS | {
    "rope_parameters": Key(dict, keys=ROPES),
    "rope_local_base_freq": AT_LEAST_1,
    "query_pre_attn_scalar": AT_LEAST_1,
    "sliding_window": LENGTH,
    "layer_types": LAYER_TYPES,
    "sliding_window_pattern": COUNT,
    "_sliding_window_pattern": COUNT,  # transformers 5 writes it beside layer_types
}


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    layers, head_dim = hf["num_hidden_layers"], hf["head_dim"]
    layer_types = hf.get("layer_types") or _layer_types(layers, period=hf.get("sliding_window_pattern") or 6)
    window = hf.get("sliding_window", 4096)

    # transformers 4 writes rope_theta and rope_scaling for full attention and rope_local_base_freq for sliding
    # attention, transformers 5 writes rope_parameters with an entry for each.
    no_rope = {"rope_scaling": None, "rope_parameters": None}
    by_type = hf.get("rope_parameters") or {}
    full = {"rope_parameters": (by_type.get("full_attention") or {}) | (hf.get("rope_scaling") or {})}
    sliding = {"rope_parameters": by_type.get("sliding_attention"), "rope_theta": hf.get("rope_local_base_freq")}
    ropes = {
        "full_attention": rope(hf | no_rope | full, head_dim, theta=1e6),
        "sliding_attention": rope(hf | no_rope | sliding, head_dim, theta=1e4),
    }
    return replace(
        gemma.like_gemma(hf | no_rope),
        block="sandwich",
        qk_norm=True,
        attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        windows=windows({"layer_types": layer_types, "sliding_window": window}, layers),
        ropes=tuple(ropes[layer_type] for layer_type in layer_types),
    )


def _layer_types(layers: int, period: int) -> list[str]:
    """Full attention in every layer whose number, counted from 1, is a multiple of `period`."""
    return ["full_attention" if i % period == 0 else "sliding_attention" for i in range(1, layers + 1)]


FAMILY = replace(
    llama.FAMILY,
    keys=KEYS,
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
    other_classes=("Gemma3TextModel", "Gemma3TextForCausalLM"),
)
