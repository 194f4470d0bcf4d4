"""EXAONE 3 and 3.5: a LLaMA whose config.json and tensors have other names. `model_type` "exaone".

transformers opens such a folder as a LLaMA, too, and has no reward model of it: a LLaMA is saved.
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.rules import NULL_MEANS_NONE
from rm.model.transformer import ModelConfig

NAMES = {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}
DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 500000.0}
PARTS = {  # of the names of modules, in this order: a LLaMA's -> the published ones
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "o_proj": "out_proj",
    "self_attn": "attn.attention",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}


def as_llama(hf: dict) -> dict:
    """The config.json of the same model as a LLaMA."""
    present = {name: value for name, value in hf.items() if value is not None or name in NULL_MEANS_NONE}
    return DEFAULTS | {NAMES.get(name, name): value for name, value in present.items()} | {"model_type": "llama"}


def config(hf: dict) -> ModelConfig:
    return llama.config(as_llama(hf))


def _stored(module: str) -> str:
    """The published name of a module of a LLaMA."""
    for of_llama, published in PARTS.items():
        module = module.replace(of_llama, published)
    return module


FAMILY = replace(
    llama.FAMILY,
    config=config,
    aliases=NAMES,
    text=as_llama,
    # transformers' names first: adapters are written with them.
    modules=llama.FAMILY.modules | {_stored(module): part for module, part in llama.FAMILY.modules.items()},
    prefix="transformer.",
    ignored=frozenset(),
    classes={"lm": "ExaoneForCausalLM", "reward": "ExaoneForSequenceClassification"},
    other_classes=("ExaoneModel",),
)
