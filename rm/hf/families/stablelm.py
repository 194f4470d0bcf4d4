"""StableLM 3B and 1.6B: a LLaMA with LayerNorm and rotary positions on a quarter of a head. `model_type` "stablelm".

The 12B model has norms on q and k with weights of their own for every head (`qk_layernorm`), and one norm for attention
and MLP (`use_parallel_residual`): these are not implemented.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import FLAG, NUMBER, OFF
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    like_llama = llama.config({"max_position_embeddings": 4096} | hf, partial=0.25)
    eps = hf.get("layer_norm_eps", 1e-5)
    return replace(like_llama, norm="layer", norm_eps=eps, qkv_bias=hf.get("use_qkv_bias", False))


KEYS = {name: key for name, key in llama.KEYS.items() if name not in ("rms_norm_eps", "attention_bias", "head_dim")}
FAMILY = replace(
    llama.FAMILY,
    keys=KEYS
    | {
        "layer_norm_eps": NUMBER,
        "use_qkv_bias": FLAG,
        "qk_layernorm": OFF,
        "use_parallel_residual": OFF,
        "mlp_bias": OFF,
    },
    config=config,
    classes={"lm": "StableLmForCausalLM", "reward": "StableLmForSequenceClassification"},
    other_classes=("StableLmModel",),
)
