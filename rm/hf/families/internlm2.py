"""InternLM 2 and 2.5: a LLaMA whose checkpoint has q, k and v as one tensor, interleaved by kv head. `model_type`
"internlm2".

transformers has no such family and runs code in the folder, which is never done here: a LLaMA is saved.
"""

from rm.hf.families import llama
from rm.hf.families.keys import FLAG
from rm.hf.families.layout import QKV, Layout
from rm.hf.families.rules import Family
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

NOT_OF_LLAMA = ("attention_bias", "mlp_bias", "head_dim")


def as_llama(hf: dict) -> dict:
    """The config.json of the same model as a LLaMA."""
    bias = {"model_type": "llama", "attention_bias": hf.get("bias", True), "mlp_bias": False}
    same = {name: value for name, value in hf.items() if name not in ("auto_map", "attn_implementation", "bias")}
    return same | bias


def config(hf: dict) -> ModelConfig:
    return llama.config(as_llama(hf))


FAMILY = Family(
    keys={name: key for name, key in llama.KEYS.items() if name not in NOT_OF_LLAMA}
    | {"bias": FLAG, "attn_implementation": Key(str)},
    config=config,
    text=as_llama,
    modules={
        "model.tok_embeddings": "embed",
        "model.layers.{}.attention_norm": "layers.{}.attn_norm",
        "model.layers.{}.attention.wqkv": Layout(QKV, by_head=True),
        "model.layers.{}.attention.wo": "layers.{}.attn.o_proj",
        "model.layers.{}.ffn_norm": "layers.{}.mlp_norm",
        "model.layers.{}.feed_forward.w1": "layers.{}.mlp.gate_proj",
        "model.layers.{}.feed_forward.w3": "layers.{}.mlp.up_proj",
        "model.layers.{}.feed_forward.w2": "layers.{}.mlp.down_proj",
        "model.norm": "norm",
        "output": "lm_head",
    },
    prefix="model.",
    ignored=frozenset({"model.layers.{}.attention.rotary_emb.inv_freq"}),
    classes={"lm": "InternLM2ForCausalLM", "reward": "InternLM2ForSequenceClassification"},
    other_classes=("InternLM2Model",),
)
