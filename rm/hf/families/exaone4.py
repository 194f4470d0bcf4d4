"""EXAONE 4: an OLMo 2 with a norm on each head's q and k. Where layers have a sliding window, only those have rotary
positions. `model_type` "exaone4".
"""

from dataclasses import replace

from rm.hf.families import olmo2
from rm.hf.families.keys import LENGTH, OFF
from rm.hf.families.rules import LAYER_TYPES, every_nth_full, windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    like_olmo2 = olmo2.config({"num_key_value_heads": 32} | hf)
    layers, window = like_olmo2.n_layers, hf.get("sliding_window", 4096)
    layer_types = hf.get("layer_types") or _by_pattern(layers, hf.get("sliding_window_pattern") or 4 if window else 1)
    rope = like_olmo2.ropes[0]
    return replace(
        like_olmo2,
        qk_norm="head",
        windows=windows({"layer_types": layer_types, "sliding_window": window}, layers),
        ropes=tuple(rope if kind == "sliding_attention" or window is None else None for kind in layer_types),
    )


def _by_pattern(layers: int, pattern: int | str) -> list[str]:
    if isinstance(pattern, str):
        raise ValueError(f"sliding_window_pattern {pattern!r} needs layer_types, which say the same layer by layer")
    return every_nth_full(layers, pattern)


FAMILY = replace(
    olmo2.FAMILY,
    keys=olmo2.FAMILY.keys
    | {
        "attention_bias": OFF,
        "sliding_window": LENGTH,
        "sliding_window_pattern": Key((int, str), minimum=0),
        "layer_types": LAYER_TYPES,
    },
    config=config,
    classes={"lm": "Exaone4ForCausalLM", "reward": "Exaone4ForSequenceClassification"},
    other_classes=("Exaone4Model",),
)
