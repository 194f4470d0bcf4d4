"""Gemma, the first: a LLaMA with GeGLU, norms that store their distance from one, and embeddings scaled by the root of
the width. `model_type` "gemma".
"""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.rules import only
from rm.model.transformer import ModelConfig

DEFAULTS = {"head_dim": 256, "num_key_value_heads": 16, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def config(hf: dict) -> ModelConfig:
    only(hf, "hidden_act", "gelu_pytorch_tanh", "gelu")  # its first releases wrote gelu and meant the other
    return like_gemma(DEFAULTS | hf)


def like_gemma(hf: dict) -> ModelConfig:
    """What all Gemmas have in common."""
    only(hf, "use_bidirectional_attention", False, None)
    read = llama.config(hf | {"hidden_act": "gelu_pytorch_tanh"})
    return replace(read, norm="rms_offset", embed_scale=read.dim**0.5)


FAMILY = replace(
    llama.FAMILY, config=config, classes={"lm": "GemmaForCausalLM", "reward": "GemmaForSequenceClassification"}
)
