"""Qwen 2 and 2.5: a LLaMA with a bias on q, k and v, and optional windows in the upper layers. `model_type` "qwen2"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import FLAG, LENGTH, OFF
from rm.hf.families.rules import LAYER_TYPES, windows
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

WINDOW_KEYS = {
    "use_sliding_window": FLAG,
    "sliding_window": LENGTH,
    "max_window_layers": LENGTH,
    "layer_types": LAYER_TYPES,
}


DEFAULTS = {"max_position_embeddings": 32768}


def config(hf: dict) -> ModelConfig:
    return replace(llama.config(DEFAULTS | hf), qkv_bias=True, out_bias=False, windows=upper_windows(hf))


def upper_windows(hf: dict) -> tuple[int, ...]:
    """The window of each layer, 0 = full attention; all 0 unless `use_sliding_window` is set.

    `layer_types` says which layers have a window; without it, those from `max_window_layers` on.
    """
    layers = hf["num_hidden_layers"]
    full_layers = hf.get("max_window_layers", 28)
    by_depth = ["full_attention" if i < full_layers else "sliding_attention" for i in range(layers)]
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else 0
    return windows({"layer_types": hf.get("layer_types") or by_depth, "sliding_window": window}, layers)


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS
    | WINDOW_KEYS
    | {
        "attention_bias": FLAG,  # without effect: q, k and v always have one, the output never
        "mlp_bias": OFF,
        "dual_chunk_attention_config": Key(dict),  # vLLM reads it, for texts beyond 256k tokens; transformers does not
    },
    config=config,
    classes={"lm": "Qwen2ForCausalLM", "reward": "Qwen2ForSequenceClassification"},
    other_classes=("Qwen2Model",),
)
