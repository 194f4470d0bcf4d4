"""Ministral 8B: a Mistral whose `layer_types` say which layers have the sliding window. `model_type` "ministral"."""

from dataclasses import replace

from rm.hf.families import mistral

FAMILY = replace(
    mistral.FAMILY,
    classes={"lm": "MinistralForCausalLM", "reward": "MinistralForSequenceClassification"},
    other_classes=("MinistralModel",),
)
