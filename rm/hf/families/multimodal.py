"""Models that also read images: their text model is read, the rest is left on disk, and a text model is saved.

`model_type` "gemma3" (Gemma 3 4B to 27B) holds a gemma3_text, "mistral3" (Mistral Small 3.1 and 3.2, Ministral 3) a
mistral or a ministral3.
"""

from dataclasses import replace
from pathlib import Path

from rm.hf.families import gemma3, ministral3, mistral
from rm.hf.families.keys import FLAG
from rm.hf.families.layout import Layout
from rm.hf.families.rules import Family
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

# What text_config may leave out: the defaults of transformers.
GEMMA3_TEXT = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26} | {
    "num_attention_heads": 8,
}
IMAGES = """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index mm_tokens_per_image
    multimodal_projector_bias projector_hidden_act spatial_merge_size vision_feature_layer""".split()
KEYS = {name: Key() for name in IMAGES} | {
    "text_config": Key(dict, required=True),
    "vision_config": Key(dict),
    "tie_word_embeddings": FLAG,
}
IMAGE_TENSORS = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def text_part(inner: dict[str, Family], defaults: dict, classes: dict[str, str]) -> Family:
    """The family of folders whose `text_config` is of one of the `inner` families, of the first where it does not say.

    Args:
        defaults: of text_config.
        classes: as for `Family`, of the whole model.
    """
    first = next(iter(inner))

    def text(hf: dict) -> dict:
        own = {name: value for name, value in hf["text_config"].items() if name not in ("architectures", "auto_map")}
        outer = {name: value for name, value in hf.items() if name not in KEYS or name == "tie_word_embeddings"}
        return defaults | outer | {"model_type": first} | own

    def config(hf: dict) -> ModelConfig:
        flat = text(hf)
        if flat["model_type"] not in inner:
            raise ValueError(f"text_config.model_type {flat['model_type']!r} is not supported, only {', '.join(inner)}")
        return inner[flat["model_type"]].read(flat | {"architectures": None}, Path("text_config"))

    return replace(
        inner[first],
        keys=KEYS,
        config=config,
        text=text,
        modules=_prefixed(inner[first].modules),
        not_read=IMAGE_TENSORS,
        classes=classes,
        other_classes=(),
    )


def _prefixed(modules: dict[str, str | Layout]) -> dict[str, str | Layout]:
    """The table of a text model's modules under the names of transformers 5, and those of the published files."""
    now = {name.replace("model.", "model.language_model.", 1): part for name, part in modules.items()}
    return now | {f"language_model.{name}": part for name, part in modules.items()}


GEMMA3 = text_part(
    {"gemma3_text": gemma3.FAMILY},
    GEMMA3_TEXT,
    {"lm": "Gemma3ForConditionalGeneration", "reward": "Gemma3ForSequenceClassification"},
)
MISTRAL3 = text_part(
    {"mistral": mistral.FAMILY, "ministral3": ministral3.FAMILY},
    {},
    {"lm": "Mistral3ForConditionalGeneration", "reward": "Mistral3ForSequenceClassification"},
)
