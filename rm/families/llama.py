"""LLaMA 1 and 2, and what is built like them (TinyLlama, SmolLM2, Vicuna, ...): `model_type` "llama".

Defaults are those of transformers. Dropout settings are deliberately not read: the base model runs without
dropout here, in training too.
"""

from rm.families.rules import Family, divides, only
from rm.model import ModelConfig


def config(hf: dict) -> ModelConfig:
    only(hf, "hidden_act", "silu")
    hf = hf | {"num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"]}
    divides(hf, "num_attention_heads", "num_key_value_heads")
    head_dim = hf.get("head_dim") or divides(hf, "hidden_size", "num_attention_heads")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: rotary positions turn pairs")

    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        hidden_dim=hf["intermediate_size"],
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        mlp="swiglu",
        positions="rope",
        max_positions=hf.get("max_position_embeddings", 2048),
        rope_theta=rope_theta(hf),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        attn_scale=head_dim**-0.5,
        windows=(0,) * hf["num_hidden_layers"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def rope_theta(hf: dict) -> float:
    """The base of the rotary frequencies: transformers 4 writes it on its own, 5 into `rope_parameters`."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_scaling of type {kind!r} is not implemented, only plain rotary positions")
    only(hf | rope, "partial_rotary_factor", 1.0, None)
    return float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))


FAMILY = Family(
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
        "score": "score",
    },
    prefix="model.",
    ignored=frozenset({"model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}),
    classes={"lm": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"},
)
