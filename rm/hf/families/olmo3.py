"""OLMo 3: an OLMo 2 with a sliding window in three layers of four, and rope scaling in the fourth only. `model_type`
"olmo3".
"""

from dataclasses import replace

from rm.hf.families import olmo2
from rm.hf.families.gemma3 import ROPES
from rm.hf.families.keys import LENGTH
from rm.hf.families.rope import by_layer_type
from rm.hf.families.rules import LAYER_TYPES, every_nth_full, windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    like_olmo2 = olmo2.config(hf | {"rope_scaling": None, "rope_parameters": None})
    layers, window = like_olmo2.n_layers, hf.get("sliding_window", 4096)
    layer_types = hf.get("layer_types") or every_nth_full(layers, 4)
    ropes = by_layer_type(
        {"max_position_embeddings": like_olmo2.max_positions} | hf,
        like_olmo2.head_dim,
        full_theta=5e5,
        sliding_theta=5e5,
    )
    return replace(
        like_olmo2,
        windows=windows({"layer_types": layer_types, "sliding_window": window}, layers),
        ropes=tuple(ropes[layer_type] for layer_type in layer_types),
    )


FAMILY = replace(
    olmo2.FAMILY,
    keys=olmo2.FAMILY.keys
    | {"rope_parameters": Key(dict, keys=ROPES), "sliding_window": LENGTH, "layer_types": LAYER_TYPES},
    config=config,
    classes={"lm": "Olmo3ForCausalLM", "reward": "Olmo3ForSequenceClassification"},
    other_classes=("Olmo3Model",),
)
