"""What a model family consists of: how to read its config.json, its tensor names, its class names in transformers.

A family is data. Loading and saving read the same table of module names, so that the two cannot disagree.

A checkpoint name (`hf_name`) is a tensor's name in a Hugging Face checkpoint, model.layers.7.self_attn.q_proj.weight;
a parameter name (`name`) is that of a parameter of our model, layers.7.attn.q_proj.weight.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rm.hf.families.keys import COMMON, HEADS, LAYERS_OF_HEAD
from rm.hf.families.layout import Layout
from rm.json_keys import Key, check_keys
from rm.model.transformer import ModelConfig

LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
# Reward models whose head is linear, ReLU, linear. The tensors do not tell what is between: the class has to be known.
WITH_TWO_LAYERS = ("INFORMForSequenceClassification", "Qwen2ForRewardModel")  # INF-ORM; Qwen2.5-Math-RM, WorldPM
WRAPPERS = ("RewardModel",)  # OpenRLHF's class around any family: a linear head on the last token
# No window, one kv head for each head, no cap; other nulls mean that a key is absent.
NULL_MEANS_NONE = ("sliding_window", "num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping")
LAYER_TYPES = Key(list, items=Key(str, only=("full_attention", "sliding_attention")))


@dataclass(frozen=True)
class Family:
    """What `rm.hf.weights` has to know of a family.

    Attributes:
        keys: of its config.json, besides those that all families have in common (`rm.hf.families.keys`).
        config: makes a `ModelConfig` of a config.json whose keys have been checked; raises ValueError for what the
            model does not implement. See `read`.
        modules: checkpoint module -> module of our model, or a `Layout` of several; {} stands for the layer index. A
            tensor keeps its last component, weight or bias. Where several checkpoint modules map to one of ours, the
            first is the one that is written.
        prefix: what a checkpoint of a model with a head has before the names of the base model, such as "model.".
        ignored: checkpoint tensors that are saved buffers, not weights (attention masks, rotary tables); old versions
            of transformers wrote them.
        classes: "lm" or "reward" -> class name in transformers, written to config.json as `architectures`.
        other_classes: names of classes that compute the same, in config.json files of others.
        aliases: another name of a key -> the key, where transformers reads both.
        text: makes the config.json of the folder that is written, of another family: of a model that also reads images,
            its text model. None: the file stays.
        not_read: what the names of tensors begin with that are left on disk.
    """

    keys: dict[str, Key]
    config: Callable[[dict], ModelConfig]
    modules: dict[str, str | Layout]
    prefix: str
    ignored: frozenset[str]
    classes: dict[str, str]
    other_classes: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    text: Callable[[dict], dict] | None = None
    not_read: tuple[str, ...] = ()

    def read(self, hf: dict, file: Path = Path("config.json")) -> ModelConfig:
        """The config of our model.

        Raises:
            ValueError: the file has a key that is not known, or a value that the model does not implement.
        """
        if hf.get("quantization_config"):
            raise ValueError(f"{file}: quantization_config: quantized weights are not implemented")
        hf = self._without_aliases(hf, file)
        # A class of its own, with code in the folder, may compute another attention, or a reward in another way.
        classes = (*self.classes.values(), *self.other_classes, *WRAPPERS, *WITH_TWO_LAYERS)
        check_keys(file, hf, COMMON | self.keys | {"architectures": Key(list, items=Key(str, only=classes))})
        present = {name: value for name, value in hf.items() if value is not None or name in NULL_MEANS_NONE}
        try:
            config = self.config(present)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        has_two_layers = any(name in WITH_TWO_LAYERS for name in hf.get("architectures") or [])
        return replace(config, score="two layers") if has_two_layers else config

    def _without_aliases(self, hf: dict, file: Path) -> dict:
        """The content of a config.json with each key under its own name."""
        hf = dict(hf)
        for alias, name in self.aliases.items():
            value = hf.pop(alias, None)
            if value is not None and hf.setdefault(name, value) != value:
                raise ValueError(f"{file}: {alias} {value!r} and {name} {hf[name]!r} are the same setting: correct one")
        return hf

    def parameter_names(self, hf_name: str) -> list[str]:
        """Names of our parameters that a checkpoint tensor holds, in order; empty if the family has no such tensor."""
        module, leaf, index = self._parse(hf_name)
        if module not in self._layouts:
            return []
        return [f"{part.format(index)}.{leaf}" for part in self._layouts[module].parts]

    def checkpoint_name(self, name: str) -> str:
        """Name of the checkpoint tensor that holds one of our parameters, alone or with others."""
        module, leaf, index = _split(name)
        return f"{self._checkpoint_modules[module].format(index)}.{leaf}"

    def layout(self, hf_name: str) -> Layout:
        """How a checkpoint tensor holds our parameters."""
        module, _, _ = self._parse(hf_name)
        return self._layouts[module]

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a checkpoint tensor is a saved buffer to skip."""
        module, leaf, _ = self._parse(hf_name)
        return f"{module}.{leaf}" in self.ignored

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        """Checkpoint module -> layout."""
        layouts = {}
        for hf_module, entry in (self.modules | HEADS | LAYERS_OF_HEAD).items():
            layouts[hf_module] = entry if isinstance(entry, Layout) else Layout((entry,))
        return layouts

    @cached_property
    def _checkpoint_modules(self) -> dict[str, str]:
        """Module of our model -> checkpoint module."""
        modules = {}
        for hf_module, layout in self._layouts.items():
            for part in layout.parts:
                modules.setdefault(part, hf_module)  # the first checkpoint module is the one that is written
        return modules

    def _parse(self, hf_name: str) -> tuple[str, str, str]:
        """`_split` of a checkpoint name, with the prefix that it lacks in a checkpoint of a model without a head."""
        module, leaf, index = _split(hf_name)
        known = module in self._layouts or f"{module}.{leaf}" in self.ignored
        return module if known else self.prefix + module, leaf, index


def _split(name: str) -> tuple[str, str, str]:
    """Split a tensor name: layers.7.norm.weight -> (layers.{}.norm, weight, 7); without a layer, the last is ""."""
    index = LAYER_INDEX.search(name)
    module, _, leaf = LAYER_INDEX.sub("{}", name, count=1).rpartition(".")
    return module, leaf, index[0] if index else ""


def quotient(hf: dict, dividend: str, divisor: str) -> int:
    """hf[dividend] / hf[divisor]; ValueError if it is not an integer."""
    if hf[dividend] % hf[divisor]:
        raise ValueError(f"{dividend} {hf[dividend]} is not a multiple of {divisor} {hf[divisor]}")
    return hf[dividend] // hf[divisor]


def windows(hf: dict, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, in tokens, from `layer_types` and `sliding_window`; 0 = full attention."""
    layer_types = hf.get("layer_types") or ["full_attention"] * layers
    window_of_type = {"full_attention": 0, "sliding_attention": hf.get("sliding_window") or 0}
    if len(layer_types) != layers:
        raise ValueError(f"layer_types describe {len(layer_types)} layers, num_hidden_layers is {layers}")
    return tuple(window_of_type[layer_type] for layer_type in layer_types)


def every_nth_full(layers: int, n: int) -> list[str]:
    """Layer types: full attention in every layer whose number, counted from 1, is a multiple of `n`."""
    return ["full_attention" if i % n == 0 else "sliding_attention" for i in range(1, layers + 1)]
