"""GPT-Neo: learned positions, a sliding window in every other layer, no scaling of q.k. `model_type` "gpt_neo".

Defaults are those of transformers.
"""

from dataclasses import replace

from rm.hf.families.keys import ACTIVATION, HEADS_OF_A_LAYER, LAYERS, NUMBER, PLAIN_MLPS, POSITIONS, SIZE
from rm.hf.families.rules import Family, quotient
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

KEYS = {
    "num_heads": HEADS_OF_A_LAYER,
    "hidden_size": SIZE,
    "num_layers": LAYERS,
    "vocab_size": SIZE,
    "max_position_embeddings": replace(POSITIONS, required=True),
    "intermediate_size": replace(SIZE, required=False),
    "activation_function": ACTIVATION,
    "layer_norm_epsilon": NUMBER,
    "attention_types": Key(list, items=Key(list)),
    "attention_layers": Key(list),  # the same, written out: transformers reads attention_types
    "window_size": POSITIONS,
}


def config(hf: dict) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        n_layers=hf["num_layers"],
        n_heads=hf["num_heads"],
        n_kv_heads=hf["num_heads"],
        head_dim=quotient(hf, "hidden_size", "num_heads"),
        hidden_dim=hf.get("intermediate_size") or 4 * hf["hidden_size"],
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp=PLAIN_MLPS[hf.get("activation_function", "gelu_new")],
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
    """The window of each layer, in tokens, 0 = full: `attention_types` [[["global", "local"], 6]] -> 0, 256, 0, ..."""
    window_of_type = {"global": 0, "local": hf.get("window_size", 256)}
    layer_types = []
    for entry in hf.get("attention_types") or [[["global", "local"], 12]]:
        match entry:
            case [list() as pattern, int() as times] if all(kind in ("global", "local") for kind in pattern):
                layer_types += pattern * times
            case _:
                raise ValueError(f"attention_types {entry} is not implemented, only [[global, local, ...], times]")
    if len(layer_types) != hf["num_layers"]:
        raise ValueError(f"attention_types describe {len(layer_types)} layers, num_layers is {hf['num_layers']}")
    return tuple(window_of_type[layer_type] for layer_type in layer_types)


FAMILY = Family(
    keys=KEYS,
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
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
    other_classes=("GPTNeoModel",),
)
