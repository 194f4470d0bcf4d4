"""Gemma 3, text only: a Gemma with norms before and after attention and MLP, norms on q and k, and five layers with a
sliding window, and a smaller rope base, to each layer with full attention. `model_type` "gemma3_text".
"""

from dataclasses import replace

from rm.hf.families import gemma, gemma2, llama
from rm.hf.families.keys import AT_LEAST_1, COUNT, ROPE
from rm.hf.families.rope import by_layer_type
from rm.hf.families.rules import every_nth_full, windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = gemma.DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 131072}
ROPES = {"full_attention": Key(dict, keys=ROPE), "sliding_attention": Key(dict, keys=ROPE)}
KEYS = gemma2.KEYS | {
    "rope_parameters": Key(dict, keys=ROPES),
    "rope_local_base_freq": AT_LEAST_1,
    "sliding_window_pattern": COUNT,
    "_sliding_window_pattern": COUNT,  # transformers 5 writes it beside layer_types
}


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    layers, head_dim = hf["num_hidden_layers"], hf["head_dim"]
    layer_types = hf.get("layer_types") or every_nth_full(layers, hf.get("sliding_window_pattern") or 6)
    window = hf.get("sliding_window", 4096)

    ropes = by_layer_type(hf, head_dim, full_theta=1e6, sliding_theta=1e4)
    return replace(
        gemma.like_gemma(hf | {"rope_scaling": None, "rope_parameters": None}),
        block="sandwich",
        qk_norm="head",
        **gemma2.scale_and_caps(hf),
        windows=windows({"layer_types": layer_types, "sliding_window": window}, layers),
        ropes=tuple(ropes[layer_type] for layer_type in layer_types),
    )


FAMILY = replace(
    llama.FAMILY,
    keys=KEYS,
    config=config,
    modules=gemma2.FAMILY.modules
    | {
        "model.layers.{}.self_attn.q_norm": "layers.{}.attn.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attn.k_norm",
    },
    classes={"lm": "Gemma3ForCausalLM", "reward": "Gemma3TextForSequenceClassification"},
    other_classes=("Gemma3TextModel", "Gemma3TextForCausalLM"),
)
