"""Ministral 3: a Mistral with YaRN, whose q grows with the logarithm of the position beyond the length that it was
trained for first. `model_type` "ministral3".
"""

from dataclasses import replace

from rm.hf.families import mistral
from rm.hf.families.keys import NUMBER, POSITIONS, ROPE
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "sliding_window": None}
DEFAULT_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384} | {
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
ROPE_OF_THIS = ROPE | {
    "llama_4_scaling_beta": NUMBER,
    "max_position_embeddings": POSITIONS,  # without effect: the one outside is read
}


def config(hf: dict) -> ModelConfig:
    parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or DEFAULT_ROPE
    like_mistral = mistral.config(DEFAULTS | hf | {"rope_scaling": None, "rope_parameters": parameters})
    beta, length = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    if beta is None or length is None:
        raise ValueError("rope_parameters need llama_4_scaling_beta and original_max_position_embeddings")
    rope = replace(like_mistral.ropes[0], query_growth=float(beta), query_length=length)
    return replace(like_mistral, ropes=(rope,) * like_mistral.n_layers)


FAMILY = replace(
    mistral.FAMILY,
    keys=mistral.FAMILY.keys
    | {"rope_parameters": Key(dict, keys=ROPE_OF_THIS), "rope_scaling": Key(dict, keys=ROPE_OF_THIS)},
    config=config,
    classes={"lm": "Ministral3ForCausalLM", "reward": "Ministral3ForSequenceClassification"},
    other_classes=("Ministral3Model",),
)
