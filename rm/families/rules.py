"""What a family says about itself: how to read its config.json, its names of tensors, its classes.

A family is data. Its table of module names is read in both directions, by loading and by saving, so that the
two cannot disagree.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from rm.model import ModelConfig

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Family:
    """What `rm.weights` has to know of a family.

    Attributes:
        config: reads a config.json; ValueError for a setting that the model does not implement.
        modules: their module -> ours, {} for the layer's number. A tensor keeps its leaf, weight or bias.
        prefix: what their models with a head put before the names of those without.
        ignored: their tensors that are not weights: masks and tables that old versions saved along.
        classes: "lm" or "reward" -> their class, for those who open what we save.
    """

    config: Callable[[dict], ModelConfig]
    modules: dict[str, str]
    prefix: str
    ignored: frozenset[str]
    classes: dict[str, str]

    def ours(self, name: str) -> str | None:
        """Our name of their tensor, None if it has no place here."""
        module, leaf, number = self._parse(name)
        return f"{self.modules[module].format(number)}.{leaf}" if module in self.modules else None

    def theirs(self, name: str) -> str:
        """Their name of our tensor."""
        module, leaf, number = _split(name)
        back = {ours: theirs for theirs, ours in self.modules.items()}
        return f"{back[module].format(number)}.{leaf}"

    def ignores(self, name: str) -> bool:
        """Whether their tensor is none of the weights."""
        module, leaf, _ = self._parse(name)
        return f"{module}.{leaf}" in self.ignored

    def _parse(self, name: str) -> tuple[str, str, str]:
        """`_split` of their tensor, with the prefix that a model saved without its head has not."""
        module, leaf, number = _split(name)
        known = module in self.modules or f"{module}.{leaf}" in self.ignored
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
