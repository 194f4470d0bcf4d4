"""GPT-2: learned positions; the checkpoint has one fused tensor for q, k and v. `model_type` "gpt2".

Its linear layers are Conv1D in transformers: weights stored transposed, (in, out).

Defaults are those of transformers.
"""

from dataclasses import replace

from rm.hf.families.keys import ACTIVATION, FLAG, HEADS_OF_A_LAYER, LAYERS, NUMBER, OFF, PLAIN_MLPS, POSITIONS, SIZE
from rm.hf.families.layout import QKV, Layout
from rm.hf.families.rules import Family, quotient
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

KEYS = {
    "n_head": HEADS_OF_A_LAYER,
    "n_embd": SIZE,
    "n_layer": LAYERS,
    "vocab_size": SIZE,
    "n_inner": replace(SIZE, required=False),
    "n_positions": POSITIONS,
    "activation_function": ACTIVATION,
    "layer_norm_epsilon": NUMBER,
    "scale_attn_weights": Key(bool, only=(True,)),
    "scale_attn_by_inverse_layer_idx": OFF,
    "reorder_and_upcast_attn": FLAG,  # the same, with less rounding in float16
}


def config(hf: dict) -> ModelConfig:
    head_dim = quotient(hf, "n_embd", "n_head")

    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["n_embd"],
        n_layers=hf["n_layer"],
        n_heads=hf["n_head"],
        n_kv_heads=hf["n_head"],
        head_dim=head_dim,
        hidden_dim=hf.get("n_inner") or 4 * hf["n_embd"],
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp=PLAIN_MLPS[hf.get("activation_function", "gelu_new")],
        positions="learned",
        max_positions=hf.get("n_positions", 1024),
        ropes=(None,) * hf["n_layer"],
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=head_dim**-0.5,
        windows=(0,) * hf["n_layer"],
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


FAMILY = Family(
    keys=KEYS,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    config=config,
    modules={
        "transformer.wte": "embed",
        "transformer.wpe": "embed_positions",
        "transformer.h.{}.ln_1": "layers.{}.attn_norm",
        "transformer.h.{}.attn.c_attn": Layout(QKV, transposed=True),
        "transformer.h.{}.attn.c_proj": Layout(("layers.{}.attn.o_proj",), transposed=True),
        "transformer.h.{}.ln_2": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.c_fc": Layout(("layers.{}.mlp.up_proj",), transposed=True),
        "transformer.h.{}.mlp.c_proj": Layout(("layers.{}.mlp.down_proj",), transposed=True),
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
    },
    prefix="transformer.",
    ignored=frozenset({"transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"}),
    classes={"lm": "GPT2LMHeadModel", "reward": "GPT2ForSequenceClassification"},
    other_classes=("GPT2Model",),
)
