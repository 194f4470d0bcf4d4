"""OLMo 2: a LLaMA with norms behind attention and MLP, none before, and a norm over all heads of q and k together.
`model_type` "olmo2".
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import OFF
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    return replace(llama.config({"rms_norm_eps": 1e-5} | hf), block="post-norm", qk_norm="all heads")


MODULES = {name: part for name, part in llama.FAMILY.modules.items() if name != "model.layers.{}.input_layernorm"}
FAMILY = replace(
    llama.FAMILY,
    keys=llama.KEYS | {"mlp_bias": OFF},
    config=config,
    modules=MODULES
    | {
        "model.layers.{}.self_attn.q_norm": "layers.{}.attn.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attn.k_norm",
        "model.layers.{}.post_attention_layernorm": "layers.{}.attn_post_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
    },
    classes={"lm": "Olmo2ForCausalLM", "reward": "Olmo2ForSequenceClassification"},
    other_classes=("Olmo2Model",),
)
