"""The outputs of a reward head that has several: what they are called, and which of them is the reward.

The names are `id2label` in config.json, as in transformers. An adapter has no config.json; scoring.json has them, too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rm import json_keys
from rm.config import SettingsGroup, setting
from rm.json_keys import Key

Output = int | tuple[float, ...] | None  # which one is the reward, or the weights of all; None: there is one


@dataclass(frozen=True, kw_only=True)
class HeadSettings(SettingsGroup):
    """Reward head"""

    reward_label: str | None = setting(
        None, "which output of a reward head that has several is the reward: its name, or its number, counted from 0"
    )
    reward_weights: tuple[float, ...] = setting(
        (), "the reward is the sum of all outputs of such a head times these weights, in their order"
    )

    def check(self) -> None:
        if self.reward_label is not None and self.reward_weights:
            raise ValueError("--reward_label and --reward_weights exclude each other: give one")

    @property
    def chooses(self) -> bool:
        return self.reward_label is not None or bool(self.reward_weights)


def names_of(folder: str | Path) -> tuple[str, ...]:
    """The names of the outputs of a reward model's head, of an adapter's, or of a checkpoint's; () if it names none."""
    agreed = json_keys.read(Path(folder) / "scoring.json", {"labels": Key(list, items=Key(str))}, others=True)
    config = json_keys.read(Path(folder) / "config.json", {"id2label": Key(dict, items=Key(str))}, others=True)
    if agreed.get("labels"):
        return tuple(agreed["labels"])
    names = config.get("id2label") or {}
    numbered = [names.get(str(i)) for i in range(len(names))]
    is_named = len(names) > 1 and None not in numbered and numbered != [f"LABEL_{i}" for i in range(len(names))]
    return tuple(numbered) if is_named else ()


def chosen(folder: str | Path, settings: HeadSettings) -> Output:
    """The output that the settings choose.

    Raises:
        ValueError: the folder names no such output.
    """
    if settings.reward_label is None:
        return settings.reward_weights or None
    names = names_of(folder)
    if settings.reward_label in names:
        return names.index(settings.reward_label)
    if settings.reward_label.isdecimal():
        return int(settings.reward_label)
    called = f"are called {', '.join(names)}" if names else "have no names: give a number, from 0"
    raise ValueError(f"--reward_label {settings.reward_label}: the outputs of {folder} {called}")


def one_of(outputs: Tensor, chosen: Output) -> Tensor:
    """(1, ...) the reward's row of a head's weight, or of anything with a row for each output, (A, ...)."""
    if isinstance(chosen, int):
        return outputs[chosen : chosen + 1]
    weights = torch.tensor(chosen, dtype=torch.float32)
    return torch.tensordot(weights[None], outputs.float(), dims=1)


def check(folder: str | Path, hf_name: str, outputs: int, chosen: Output) -> None:
    """Raise ValueError where a head has no such output, another number of weights, or several and none is chosen."""
    got = "" if chosen is None else f", and --reward_label is {chosen}"
    if isinstance(chosen, tuple):
        got = f", and --reward_weights has {len(chosen)} numbers"
    if outputs == 1:
        if chosen not in (None, 0):
            raise ValueError(f"{folder}: {hf_name} has one output{got}: leave that out")
        return
    if isinstance(chosen, tuple) and len(chosen) == outputs or isinstance(chosen, int) and chosen < outputs:
        return
    called = f" ({', '.join(names)})" if (names := names_of(folder)) else ""
    raise ValueError(
        f"{folder}: {hf_name} has {outputs} outputs{called}{got}: name the one that is the reward, --reward_label 0 to "
        f"{outputs - 1}, or give weights of all, --reward_weights"
    )
