"""SmolLM 3: a LLaMA without rotary positions in every fourth layer. `model_type` "smollm3"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import COUNT
from rm.hf.families.qwen2 import WINDOW_KEYS
from rm.hf.families.rules import windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def config(hf: dict) -> ModelConfig:
    like_llama = llama.config(DEFAULTS | hf, theta=2e6)
    layers, period = like_llama.n_layers, hf.get("no_rope_layer_interval", 4)
    has_rope = hf.get("no_rope_layers") or [i % period != 0 for i in range(1, layers + 1)]  # 1 where there is rope
    if len(has_rope) < layers:
        raise ValueError(f"no_rope_layers describe {len(has_rope)} layers, num_hidden_layers is {layers}")
    ropes = tuple(rope if use else None for rope, use in zip(like_llama.ropes, has_rope, strict=False))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    by_rope = ["full_attention" if use or not window else "sliding_attention" for use in has_rope[:layers]]
    layer_types = hf.get("layer_types") or by_rope
    if "sliding_attention" in layer_types and not window:
        raise ValueError("layer_types with sliding_attention need use_sliding_window and sliding_window")
    return replace(
        like_llama, ropes=ropes, windows=windows({"layer_types": layer_types, "sliding_window": window}, layers)
    )


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS
    | WINDOW_KEYS
    | {"no_rope_layers": Key(list, items=Key((int, bool))), "no_rope_layer_interval": COUNT},
    config=config,
    classes={"lm": "SmolLM3ForCausalLM", "reward": "SmolLM3ForSequenceClassification"},
    other_classes=("SmolLM3Model",),
)
