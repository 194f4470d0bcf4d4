"""StarCoder 2: a Mistral with LayerNorm, an MLP without gate, and biases everywhere. `model_type` "starcoder2"."""

from dataclasses import replace

from rm.hf.families import llama
from rm.hf.families.keys import ACTIVATION, FLAG, LENGTH, NUMBER, PLAIN_MLPS
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True}
NOT_OF_LLAMA = ("rms_norm_eps", "attention_bias", "mlp_bias", "head_dim")


def config(hf: dict) -> ModelConfig:
    like_llama = llama.config(DEFAULTS | hf | {"hidden_act": "silu"})
    bias = hf.get("use_bias", True)
    return replace(
        like_llama,
        norm="layer",
        norm_eps=hf.get("norm_epsilon", 1e-5),
        mlp=PLAIN_MLPS[hf.get("hidden_act", "gelu_pytorch_tanh")],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=(hf.get("sliding_window") or 0,) * like_llama.n_layers,
    )


FAMILY = replace(
    llama.FAMILY,
    keys={name: key for name, key in llama.KEYS.items() if name not in NOT_OF_LLAMA}
    | {
        "hidden_act": ACTIVATION,
        "norm_epsilon": NUMBER,
        "layer_norm_epsilon": NUMBER,  # without effect: the published files have both
        "use_bias": FLAG,
        "sliding_window": LENGTH,
        "mlp_type": Key(str, only=("default",)),
        "norm_type": Key(str, only=("layer_norm",)),
        "scale_attn_weights": Key(bool, only=(True,)),
        "attention_softmax_in_fp32": FLAG,  # this and the next change rounding alone
        "scale_attention_softmax_in_fp32": FLAG,
    },
    config=config,
    modules={name: part for name, part in llama.FAMILY.modules.items() if ".mlp." not in name}
    | {
        "model.layers.{}.mlp.c_fc": "layers.{}.mlp.up_proj",
        "model.layers.{}.mlp.c_proj": "layers.{}.mlp.down_proj",
    },
    classes={"lm": "Starcoder2ForCausalLM", "reward": "Starcoder2ForSequenceClassification"},
    other_classes=("Starcoder2Model",),
)
