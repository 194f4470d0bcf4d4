"""LLaMA 1 to 3 and models of the same architecture (TinyLlama, SmolLM2, Vicuna, ...). `model_type` "llama".

Defaults are those of transformers.
"""

from rm.hf.families.keys import (
    COUNT,
    FLAG,
    GATED_ACTIVATION,
    GATED_MLPS,
    HEADS_OF_A_LAYER,
    LAYERS,
    NUMBER,
    POSITIONS,
    ROPE_KEYS,
    SIZE,
)
from rm.hf.families.rope import rope
from rm.hf.families.rules import Family, quotient
from rm.model.transformer import ModelConfig

KEYS = ROPE_KEYS | {
    "num_attention_heads": HEADS_OF_A_LAYER,
    "num_key_value_heads": COUNT,
    "num_hidden_layers": LAYERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "head_dim": COUNT,
    "hidden_act": GATED_ACTIVATION,
    "rms_norm_eps": NUMBER,
    "max_position_embeddings": POSITIONS,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
}


def config(hf: dict, theta: float = 10000.0, partial: float | None = None) -> ModelConfig:
    """The config of a LLaMA; similar families replace the fields in which they differ.

    Args:
        theta, partial: of the family, see `rope`.
    """
    hf = hf | {"num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"]}
    quotient(hf, "num_attention_heads", "num_key_value_heads")
    head_dim = hf.get("head_dim") or quotient(hf, "hidden_size", "num_attention_heads")
    layers = hf["num_hidden_layers"]
    max_positions = hf.get("max_position_embeddings", 2048)

    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=layers,
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        hidden_dim=hf["intermediate_size"],
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        mlp=GATED_MLPS[hf.get("hidden_act", "silu")],
        positions="rope",
        max_positions=max_positions,
        ropes=(rope({"max_position_embeddings": max_positions} | hf, head_dim, theta, partial),) * layers,
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        attn_scale=head_dim**-0.5,
        windows=(0,) * layers,
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family(
    keys=KEYS,
    config=config,
    modules={
        "model.embed_tokens": "embed",
        "model.layers.{}.input_layernorm": "layers.{}.attn_norm",
        "model.layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
        "model.layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
        "model.layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
        "model.layers.{}.self_attn.o_proj": "layers.{}.attn.o_proj",
        "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_proj",
        "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up_proj",
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
        "model.norm": "norm",
        "lm_head": "lm_head",
    },
    prefix="model.",
    ignored=frozenset({"model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}),
    classes={"lm": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"},
    other_classes=("LlamaModel", "LLaMAForCausalLM", "LLaMaForCausalLM", "LlamaRewardModel"),  # the last one is UltraRM
)
