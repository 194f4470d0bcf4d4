"""Gemma 1: a LLaMA with GeGLU, zero-centred RMSNorm, (1 + weight), and embeddings multiplied by the square root of the
hidden size. `model_type` "gemma".
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import OFF
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = {"head_dim": 256, "num_key_value_heads": 16, "max_position_embeddings": 8192, "tie_word_embeddings": True}
KEYS = llama.KEYS | {
    # The first releases say "gelu" in config.json, but were trained with the tanh approximation.
    "hidden_act": Key(str, only=("gelu_pytorch_tanh", "gelu")),
    "hidden_activation": Key(str, only=("gelu_pytorch_tanh",)),
    "use_bidirectional_attention": OFF,
    "mlp_bias": OFF,
}


def config(hf: dict) -> ModelConfig:
    return like_gemma(DEFAULTS | hf)


def like_gemma(hf: dict) -> ModelConfig:
    """What all Gemma versions have in common."""
    like_llama = llama.config(hf | {"hidden_act": "gelu_pytorch_tanh"})
    return replace(like_llama, norm="rms_offset", embed_scale=like_llama.dim**0.5)


FAMILY = replace(
    llama.FAMILY,
    keys=KEYS,
    config=config,
    classes={"lm": "GemmaForCausalLM", "reward": "GemmaForSequenceClassification"},
    other_classes=("GemmaModel",),
)
