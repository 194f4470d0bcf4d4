"""What a model family consists of: how to read its config.json, its tensor names, its class names in transformers.

A family is data. Loading and saving read the same table of module names, so that the two cannot disagree.

A checkpoint name (`hf_name`) is a tensor's name in a Hugging Face checkpoint, model.layers.7.self_attn.q_proj.weight;
a parameter name (`name`) is that of a parameter of our model, layers.7.attn.q_proj.weight.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from rm.hf.families.layout import Layout
from rm.model.transformer import ModelConfig

LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
# Names of a reward model's head: transformers (score), OpenRLHF's former name (value_head), TRL (v_head).
HEADS = {"score": "score", "value_head": "score", "v_head": "score", "v_head.summary": "score"}


@dataclass(frozen=True)
class Family:
    """What `rm.hf.weights` has to know of a family.

    Attributes:
        config: reads a config.json; raises ValueError for a setting that the model does not implement.
        modules: checkpoint module -> module of our model, or a `Layout` of several; {} stands for the layer index. A
            tensor keeps its last component, weight or bias. Where several checkpoint modules map to one of ours, the
            first is the one that is written.
        prefix: what a checkpoint of a model with a head has before the names of the base model, such as "model.".
        ignored: checkpoint tensors that are saved buffers, not weights (attention masks, rotary tables); old versions
            of transformers wrote them.
        classes: "lm" or "reward" -> class name in transformers, written to config.json as `architectures`.
    """

    config: Callable[[dict], ModelConfig]
    modules: dict[str, str | Layout]
    prefix: str
    ignored: frozenset[str]
    classes: dict[str, str]

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
        for hf_module, entry in (self.modules | HEADS).items():
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


def only(hf: dict, setting: str, *implemented) -> None:
    """Raise ValueError for a value that the model does not implement. The first of `implemented` is the default."""
    value = hf.get(setting, implemented[0])
    if value not in implemented:
        raise ValueError(f"{setting} {value!r} is not implemented, only {' or '.join(map(repr, implemented))}")


def quotient(hf: dict, dividend: str, divisor: str) -> int:
    """hf[dividend] / hf[divisor]; ValueError if it is not an integer."""
    if hf[dividend] % hf[divisor]:
        raise ValueError(f"{dividend} {hf[dividend]} is not a multiple of {divisor} {hf[divisor]}")
    return hf[dividend] // hf[divisor]


def windows(hf: dict, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, in tokens, from `layer_types` and `sliding_window`; 0 = full attention."""
    layer_types = hf.get("layer_types") or ["full_attention"] * layers
    window_of_type = {"full_attention": 0, "sliding_attention": hf.get("sliding_window") or 0}
    unknown = sorted(set(layer_types) - window_of_type.keys())
    if unknown:
        raise ValueError(f"layer_types {unknown} are not implemented, only {' and '.join(window_of_type)}")
    if len(layer_types) != layers:
        raise ValueError(f"layer_types describe {len(layer_types)} layers, num_hidden_layers is {layers}")
    return tuple(window_of_type[layer_type] for layer_type in layer_types)
