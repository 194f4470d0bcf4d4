"""Qwen 2 and 2.5: a LLaMA with a bias on q, k and v, and perhaps windows in its upper layers. `model_type` "qwen2"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.rules import windows
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    return replace(llama.config(hf), qkv_bias=True, out_bias=False, windows=upper_windows(hf))


def upper_windows(hf: dict) -> tuple[int, ...]:
    """By `layer_types`, or else in the layers from `max_window_layers` on; and only if `use_sliding_window` says so."""
    layers = hf["num_hidden_layers"]
    whole = hf.get("max_window_layers", 28)
    kinds = ["full_attention" if i < whole else "sliding_attention" for i in range(layers)]
    sees = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else 0
    return windows({"layer_types": hf.get("layer_types") or kinds, "sliding_window": sees}, layers)


FAMILY = replace(
    llama.FAMILY, config=config, classes={"lm": "Qwen2ForCausalLM", "reward": "Qwen2ForSequenceClassification"}
)
