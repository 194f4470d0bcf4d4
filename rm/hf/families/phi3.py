"""Phi-3 and Phi-4: a LLaMA whose checkpoint has fused q, k and v, and fused gate and up. `model_type` "phi3".

The variants for long contexts (rope_scaling "longrope") are not implemented: their frequencies depend on the length of
the sequence.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import LENGTH, OFF
from rm.hf.families.layout import QKV, Layout
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type != "default":  # transformers treats every other type as longrope
        raise ValueError(f"rope_scaling of type {rope_type!r} is not implemented for this family, only default")
    like_llama = llama.config({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | hf, partial=1.0)
    return replace(like_llama, windows=(hf.get("sliding_window") or 0,) * like_llama.n_layers)


FUSED = {
    "model.layers.{}.self_attn.qkv_proj": Layout(QKV),
    "model.layers.{}.mlp.gate_up_proj": Layout(("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj")),
}
FUSED_PARTS = {part for layout in FUSED.values() for part in layout.parts}
NOT_FUSED = {hf_module: part for hf_module, part in llama.FAMILY.modules.items() if part not in FUSED_PARTS}

FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS
    | {
        "sliding_window": LENGTH,
        "attention_bias": OFF,
        "mlp_bias": OFF,
        "lm_head_bias": OFF,
    },
    config=config,
    modules=NOT_FUSED | FUSED,
    classes={"lm": "Phi3ForCausalLM", "reward": "Phi3ForSequenceClassification"},
    other_classes=("Phi3Model",),
)
