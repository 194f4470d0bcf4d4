"""GPT-Neo: learned positions, every other layer sees a window, q.k is not scaled. `model_type` "gpt_neo".

Defaults are those of transformers. Dropout settings are deliberately not read: the base model runs without
dropout here, in training too.
"""

from rm.hf.families.rules import Family, divides, only
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    only(hf, "activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function

    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=hf["num_layers"],
        n_heads=hf["num_heads"],
        n_kv_heads=hf["num_heads"],
        head_dim=divides(hf, "hidden_size", "num_heads"),
        hidden_dim=hf.get("intermediate_size") or 4 * hf["hidden_size"],
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp="gelu_tanh",
        positions="learned",
        max_positions=hf["max_position_embeddings"],
        ropes=(None,) * hf["num_layers"],
        qkv_bias=False,
        out_bias=True,
        mlp_bias=True,
        attn_scale=1.0,
        windows=windows(hf),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def windows(hf: dict) -> tuple[int, ...]:
    """`attention_types` [[["global", "local"], 6]] -> what each layer sees: 0, 256, 0, 256, ..."""
    kinds = [
        kind for pattern, times in hf.get("attention_types") or [[["global", "local"], 12]] for kind in pattern * times
    ]
    sees = {"global": 0, "local": hf.get("window_size", 256)}
    if not sees.keys() >= set(kinds):
        raise ValueError(
            f"attention_types {sorted(set(kinds) - sees.keys())} are not implemented, only global and local"
        )
    if len(kinds) != hf["num_layers"]:
        raise ValueError(f"attention_types describe {len(kinds)} layers, num_layers says {hf['num_layers']}")
    return tuple(sees[kind] for kind in kinds)


FAMILY = Family(
    config=config,
    modules={
        "transformer.wte": "embed",
        "transformer.wpe": "embed_positions",
        "transformer.h.{}.ln_1": "layers.{}.attn_norm",
        "transformer.h.{}.attn.attention.q_proj": "layers.{}.attn.q_proj",
        "transformer.h.{}.attn.attention.k_proj": "layers.{}.attn.k_proj",
        "transformer.h.{}.attn.attention.v_proj": "layers.{}.attn.v_proj",
        "transformer.h.{}.attn.attention.out_proj": "layers.{}.attn.o_proj",
        "transformer.h.{}.ln_2": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.c_fc": "layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.c_proj": "layers.{}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
    },
    prefix="transformer.",
    ignored=frozenset({"transformer.h.{}.attn.attention.bias", "transformer.h.{}.attn.attention.masked_bias"}),
    classes={"lm": "GPTNeoForCausalLM", "reward": "GPTNeoForSequenceClassification"},
)
