"""Phi-3 and Phi-4: a LLaMA whose checkpoint has fused q, k and v, and fused gate and up. `model_type` "phi3".

The variants for long texts (rope_scaling "longrope") have two lists of factors. transformers takes the long one for a
batch with a text of more than `original_max_position_embeddings` tokens; here one is taken for all texts of a run, by
`--max_length`, and a model that was trained with the long one is saved with no other.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import LENGTH, OFF
from rm.hf.families.layout import QKV, Layout
from rm.model.transformer import ModelConfig

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
LONGROPE = ("longrope", "su", "yarn")  # three names of the same in this family


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    window = hf.get("sliding_window") or 0
    if rope_type == "default":
        like_llama = llama.config(hf, partial=1.0)
        return replace(like_llama, windows=(window,) * like_llama.n_layers)
    if rope_type not in LONGROPE:
        raise ValueError(
            f"rope_scaling of type {rope_type!r} is not implemented for this family, only default, longrope"
        )
    if not (scaling.get("short_factor") and scaling.get("long_factor")):
        raise ValueError("rope_scaling of type 'longrope' needs short_factor and long_factor")
    length = hf["original_max_position_embeddings"]  # transformers reads none in rope_scaling
    short, long = (_with_factors(hf, scaling, name, length) for name in ("short_factor", "long_factor"))
    return replace(short, windows=(window,) * short.n_layers, long_ropes=long.ropes, long_beyond=length)


def _with_factors(hf: dict, scaling: dict, name: str, length: int) -> ModelConfig:
    """The config with one of the two lists of factors for every text."""
    factor = scaling.get("factor") or hf["max_position_embeddings"] / length
    one_list = {"rope_type": "longrope", "factor": factor, "factors": scaling[name]}
    return llama.config(hf | {"rope_parameters": scaling | one_list, "rope_scaling": None}, partial=1.0)


def with_long_factors(hf: dict) -> dict:
    """A config.json that has the long list in place of both, for texts of every length."""
    out = dict(hf)
    for name in ("rope_scaling", "rope_parameters"):
        if out.get(name):
            out[name] = out[name] | {"short_factor": out[name]["long_factor"]}
    return out


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
