"""Phi-3 and Phi-4: a LLaMA that stores q, k and v as one tensor, and gate and up as one. `model_type` "phi3".

Their variants for long texts (rope_scaling "longrope") change their frequencies with the length of what they read: not
implemented.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.layout import QKV, Layout
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":  # transformers takes every other for longrope
        raise ValueError(f"rope_scaling of type {kind!r} is not implemented for this family, only default")
    read = llama.config({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | hf, partial=1.0)
    return replace(read, windows=(hf.get("sliding_window") or 0,) * read.n_layers)


FUSED = {
    "model.layers.{}.self_attn.qkv_proj": Layout(QKV),
    "model.layers.{}.mlp.gate_up_proj": Layout(("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj")),
}
INSIDE = {part for layout in FUSED.values() for part in layout.parts}

FAMILY = replace(
    llama.FAMILY,
    config=config,
    modules={theirs: ours for theirs, ours in llama.FAMILY.modules.items() if ours not in INSIDE} | FUSED,
    classes={"lm": "Phi3ForCausalLM", "reward": "Phi3ForSequenceClassification"},
)
