"""The model families: `model_type` in config.json -> what `rm.hf.weights` has to know of it.

A new family is a file of its own and an entry in `FAMILIES`.
"""

from pathlib import Path

from rm.hf.families import (
    exaone,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gpt_neo,
    gpt_neox,
    granite,
    granite4,
    internlm2,
    llama,
    ministral,
    ministral3,
    mistral,
    multimodal,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from rm.hf.families.rules import Family

FAMILIES: dict[str, Family] = {
    "exaone": exaone.FAMILY,
    "exaone4": exaone4.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": multimodal.GEMMA3,
    "gemma3_text": gemma3.FAMILY,
    "glm4": glm4.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neo": gpt_neo.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "granite": granite.FAMILY,
    "granitemoehybrid": granite4.FAMILY,
    "internlm2": internlm2.FAMILY,
    "llama": llama.FAMILY,
    "ministral": ministral.FAMILY,
    "ministral3": ministral3.FAMILY,
    "mistral": mistral.FAMILY,
    "mistral3": multimodal.MISTRAL3,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "smollm3": smollm3.FAMILY,
    "stablelm": stablelm.FAMILY,
    "starcoder2": starcoder2.FAMILY,
}


def find(hf: dict, file: Path = Path("config.json")) -> Family:
    """The family of a config.json; ValueError if it is not supported."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{file}: model_type {model_type!r} is not supported, only {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
