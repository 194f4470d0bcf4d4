"""GPT-NeoX and Pythia: attention parallel to the MLP, rotary positions on a quarter of a head. `model_type` "gpt_neox".

The checkpoint has one fused tensor for q, k and v, interleaved by head.

Defaults are those of transformers.
"""

from rm.hf.families.keys import (
    ACTIVATION,
    AT_LEAST_1,
    FLAG,
    HEADS_OF_A_LAYER,
    LAYERS,
    NUMBER,
    PLAIN_MLPS,
    POSITIONS,
    ROPE_KEYS,
    SIZE,
)
from rm.hf.families.layout import QKV, Layout
from rm.hf.families.rope import rope
from rm.hf.families.rules import Family, quotient
from rm.model.transformer import ModelConfig

KEYS = ROPE_KEYS | {
    "num_attention_heads": HEADS_OF_A_LAYER,
    "num_hidden_layers": LAYERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": NUMBER,
    "max_position_embeddings": POSITIONS,
    "rotary_emb_base": AT_LEAST_1,
    "rotary_pct": NUMBER,
    # At the top level, transformers reads the two above in place of these.
    "rope_theta": AT_LEAST_1,
    "partial_rotary_factor": NUMBER,
    "attention_bias": FLAG,
    "use_parallel_residual": FLAG,
}


def config(hf: dict) -> ModelConfig:
    head_dim = quotient(hf, "hidden_size", "num_attention_heads")
    layers = hf["num_hidden_layers"]
    theta, partial = hf.get("rotary_emb_base", 10000.0), hf.get("rotary_pct", 0.25)
    own_names = {"rope_theta": theta, "partial_rotary_factor": partial}
    max_positions = hf.get("max_position_embeddings", 2048)
    layer_rope = rope({"max_position_embeddings": max_positions} | hf | own_names, head_dim, partial=partial)

    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=layers,
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_attention_heads"],
        head_dim=head_dim,
        hidden_dim=hf["intermediate_size"],
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        mlp=PLAIN_MLPS[hf.get("hidden_act", "gelu")],
        positions="rope",
        max_positions=max_positions,
        ropes=(layer_rope,) * layers,
        qkv_bias=hf.get("attention_bias", True),
        out_bias=hf.get("attention_bias", True),
        mlp_bias=True,
        attn_scale=head_dim**-0.5,
        windows=(0,) * layers,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        block="parallel" if hf.get("use_parallel_residual", True) else "serial",
    )


FAMILY = Family(
    keys=KEYS,
    config=config,
    modules={
        "gpt_neox.embed_in": "embed",
        "gpt_neox.layers.{}.input_layernorm": "layers.{}.attn_norm",
        "gpt_neox.layers.{}.attention.query_key_value": Layout(QKV, by_head=True),
        "gpt_neox.layers.{}.attention.dense": "layers.{}.attn.o_proj",
        "gpt_neox.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up_proj",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down_proj",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "lm_head",
        "lm_head": "lm_head",  # its name in state dicts of transformers 5, and in checkpoints saved from those
    },
    prefix="gpt_neox.",
    ignored=frozenset(
        {
            "gpt_neox.layers.{}.attention.bias",
            "gpt_neox.layers.{}.attention.masked_bias",
            "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
        }
    ),
    classes={"lm": "GPTNeoXForCausalLM", "reward": "GPTNeoXForSequenceClassification"},
    other_classes=("GPTNeoXModel",),
)
