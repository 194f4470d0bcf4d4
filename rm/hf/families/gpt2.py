"""GPT-2: learned positions; the checkpoint has one fused tensor for q, k and v. `model_type` "gpt2".

Its linear layers are Conv1D in transformers: weights stored transposed, (in, out).

Defaults are those of transformers. Dropout settings are deliberately not read: the base model runs without dropout
here, in training too.
"""

from rm.hf.families.layout import QKV, Layout
from rm.hf.families.rules import Family, only, quotient
from rm.model.transformer import ModelConfig


def config(hf: dict) -> ModelConfig:
    only(hf, "activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of the same function
    only(hf, "scale_attn_weights", True)
    only(hf, "scale_attn_by_inverse_layer_idx", False)
    only(hf, "add_cross_attention", False)
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
        mlp="gelu_tanh",
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
)
