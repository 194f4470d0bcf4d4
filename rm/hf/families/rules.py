"""What a family says about itself: how to read its config.json, its names of tensors, its classes.

A family is data. Its table of module names is read in both directions, by loading and by saving, so that the
two cannot disagree.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from rm.hf.families.layout import Layout
from rm.model.transformer import ModelConfig

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# What reward models call their head: transformers, OpenRLHF (of old), TRL.
HEADS = {"score": "score", "value_head": "score", "v_head": "score", "v_head.summary": "score"}


@dataclass(frozen=True)
class Family:
    """What `rm.hf.weights` has to know of a family.

    Attributes:
        config: reads a config.json; ValueError for a setting that the model does not implement.
        modules: their module -> ours, or a Layout of ours, {} for the layer's number. A tensor keeps its leaf, weight
            or bias. Where several of theirs stand for one of ours, the first is what we write.
        prefix: what their models with a head put before the names of those without.
        ignored: their tensors that are not weights: masks and tables that old versions saved along.
        classes: "lm" or "reward" -> their class, for those who open what we save.
    """

    config: Callable[[dict], ModelConfig]
    modules: dict[str, str | Layout]
    prefix: str
    ignored: frozenset[str]
    classes: dict[str, str]

    def ours(self, name: str) -> list[str]:
        """Our names of what their tensor holds, in order; none if it has no place here."""
        module, leaf, number = self._parse(name)
        return [f"{part.format(number)}.{leaf}" for part in self._layouts.get(module, Layout(())).parts]

    def theirs(self, name: str) -> str:
        """Their name of the tensor that ours is, or is a part of."""
        module, leaf, number = _split(name)
        return f"{self._back[module].format(number)}.{leaf}"

    def layout(self, name: str) -> Layout:
        """How their tensor holds ours."""
        return self._layouts[self._parse(name)[0]]

    def ignores(self, name: str) -> bool:
        """Whether their tensor is none of the weights."""
        module, leaf, _ = self._parse(name)
        return f"{module}.{leaf}" in self.ignored

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        table = self.modules | HEADS
        return {theirs: Layout((ours,)) if isinstance(ours, str) else ours for theirs, ours in table.items()}

    @cached_property
    def _back(self) -> dict[str, str]:
        """Our module -> theirs."""
        return {part: theirs for theirs, layout in reversed(self._layouts.items()) for part in layout.parts}

    def _parse(self, name: str) -> tuple[str, str, str]:
        """`_split` of their tensor, with the prefix that a model saved without its head has not."""
        module, leaf, number = _split(name)
        known = module in self._layouts or f"{module}.{leaf}" in self.ignored
        return module if known else self.prefix + module, leaf, number


def _split(name: str) -> tuple[str, str, str]:
    """layers.7.norm.weight -> layers.{}.norm, weight, 7."""
    number = LAYER_NUMBER.search(name)
    module, _, leaf = LAYER_NUMBER.sub("{}", name, count=1).rpartition(".")
    return module, leaf, number[0] if number else ""


def only(hf: dict, setting: str, *implemented) -> None:
    """Refuse a setting that the model does not implement. The first implemented value is the default."""
    got = hf.get(setting, implemented[0])
    if got not in implemented:
        raise ValueError(f"{setting} {got!r} is not implemented, only {' or '.join(map(repr, implemented))}")


def divides(hf: dict, whole: str, parts: str) -> int:
    """hf[whole] / hf[parts], which has to come out even."""
    if hf[whole] % hf[parts]:
        raise ValueError(f"{whole} {hf[whole]} is not a multiple of {parts} {hf[parts]}")
    return hf[whole] // hf[parts]


def windows(hf: dict, layers: int) -> tuple[int, ...]:
    """How far each layer sees, by `layer_types` and `sliding_window`; 0 = everything."""
    kinds = hf.get("layer_types") or ["full_attention"] * layers
    sees = {"full_attention": 0, "sliding_attention": hf.get("sliding_window") or 0}
    if unknown := sorted(set(kinds) - sees.keys()):
        raise ValueError(f"layer_types {unknown} are not implemented, only {' and '.join(sees)}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types describe {len(kinds)} layers, num_hidden_layers says {layers}")
    return tuple(sees[kind] for kind in kinds)
