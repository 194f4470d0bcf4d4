"""GLM 4 (0414): a LLaMA with norms before and after attention and MLP, and rotary positions on half of a head, which
rotate neighbouring dimensions; the checkpoint has fused gate and up. `model_type` "glm4".
"""

from dataclasses import replace

from rm.hf.families import llama, phi3
from rm.hf.families.keys import OFF
from rm.model.transformer import ModelConfig

DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07, "attention_bias": True} | {
    "max_position_embeddings": 131072
}
GATE_UP = "model.layers.{}.mlp.gate_up_proj"
NOT_FUSED = {
    name: part for name, part in llama.FAMILY.modules.items() if part not in phi3.FUSED[GATE_UP].parts
}  # without gate_proj and up_proj


def config(hf: dict) -> ModelConfig:
    like_llama = llama.config(DEFAULTS | hf, partial=0.5)
    ropes = tuple(replace(rope, interleaved=True) for rope in like_llama.ropes)
    return replace(like_llama, block="sandwich", ropes=ropes, out_bias=False)


FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS | {"mlp_bias": OFF},
    config=config,
    modules=NOT_FUSED
    | {
        GATE_UP: phi3.FUSED[GATE_UP],
        "model.layers.{}.post_self_attn_layernorm": "layers.{}.attn_post_norm",
        "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.post_mlp_layernorm": "layers.{}.mlp_post_norm",
    },
    classes={"lm": "Glm4ForCausalLM", "reward": "Glm4ForSequenceClassification"},
    other_classes=("Glm4Model",),
)
