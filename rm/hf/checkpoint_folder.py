"""A training's checkpoint as a model: the files of a Hugging Face folder, but the weights in shards, one file a rank.

Whoever takes a model's folder takes a checkpoint's: config.json, the tokenizer's files and, of a reward model,
scoring.json lie in it (`ModelFiles`), and `rm.hf.weights` reads the shards of any number of ranks. Of a training with
LoRA they hold the adapters and what else is trained; the base is read from the folder that the training started from,
and the adapters are added to it in fp32.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.hf import checksums, outputs
from rm.hf.adapter import SCORE, add_product, is_score
from rm.hf.outputs import Output
from rm.model import lora
from rm.model.lora import LoraSettings


@dataclass(frozen=True)
class ModelFiles:
    """What each checkpoint of a run gets besides its shards."""

    contents: dict[str, bytes] = field(default_factory=dict)  # file name -> content; on the main process only
    adapter: dict | None = None  # of LoRA: the "base", a folder, and the "scale" of B A; goes into state.json

    @classmethod
    def written_by(cls, write: Callable[[Path], None], base: str, settings: LoraSettings) -> "ModelFiles":
        """What `write` writes to a folder, where it is called: on the main process."""
        adapter = {"base": str(Path(base).resolve()), "scale": settings.lora_scale} if settings.use_lora else None
        if not dist.is_main():
            return cls(adapter=adapter)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            checksums.write(Path(folder))
            return cls({file.name: file.read_bytes() for file in Path(folder).iterdir()}, adapter)


def read(folder: Path, head: str) -> dict:
    """The content of state.json.

    Args:
        head: of the model that is to be filled, "lm" or "reward".

    Raises:
        ValueError: the checkpoint is damaged, or of another kind of model.
    """
    state = checkpoint.read(folder)
    if head == "lm" and any(map(is_score, state["parameters"])):
        raise ValueError(f"{folder} is of a reward model, not of a language model")
    if (adapter := state["adapter"]) and not Path(adapter["base"]).is_dir():
        raise ValueError(
            f"{folder} holds adapters, and the model that they were trained on, {adapter['base']}, is not a folder on "
            f"this machine: put it there"
        )
    return state


def check(shapes: dict[str, tuple[int, ...]], folder: Path, state: dict, chosen: Output = None) -> None:
    """Raise ValueError where a checkpoint's parameters are not those of the model.

    Args:
        shapes: of the model's parameters. A score head and adapters may be new.
        chosen: which output of a reward head that has several is read.
    """
    stored = {name: tuple(described["shape"]) for name, described in state["parameters"].items()}
    for name, shape in shapes.items():
        if lora.is_adapter(name):
            continue
        if name not in stored and not is_score(name) and state["adapter"] is None:
            raise ValueError(f"{folder} does not hold {name}: it is not of the model that its config.json describes")
        if name == SCORE and name in stored and shape[0] == 1:
            outputs.check(folder, name, stored[name][0], chosen)
        elif stored.get(name, shape) != shape:
            raise ValueError(f"{folder}: {name} has the shape {stored[name]}, and its config.json needs {shape}")


@torch.no_grad()
def load(parameters: dict[str, Tensor], folder: Path, state: dict, chosen: Output = None) -> set[str]:
    """Fill this rank's shards; adapters are added to the layers that they belong to, which hold the base's values.

    Args:
        chosen: which output of a reward head that has several is read.

    Returns:
        Names of the parameters that the checkpoint holds.

    Raises:
        ValueError: a shard has changed since it was written.
    """
    checkpoint.verify(folder, state)
    shapes = {name: described["shape"] for name, described in state["parameters"].items()}
    held = {name: p for name, p in parameters.items() if name in shapes and not lora.is_adapter(name)}
    whole = {}  # a head of which one output is read
    if SCORE in held and shapes[SCORE][0] > len(held[SCORE]):
        whole[SCORE] = torch.empty(shapes[SCORE])
        checkpoint.load(whole, None, folder, state)
        sharding.fill(held[SCORE], outputs.one_of(whole[SCORE], chosen))
    checkpoint.load({name: p for name, p in held.items() if name not in whole}, None, folder, state)
    matrices = {name: torch.empty(shape) for name, shape in shapes.items() if lora.is_adapter(name)}
    checkpoint.load(matrices, None, folder, state)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in matrices):
        weight = parameters[f"{layer}.weight"]
        shard, rows = sharding.local(weight), sharding.local_slices(weight)[0]
        if shard.numel():  # there may be more ranks than rows
            b, a = matrices[f"{layer}.lora_B"][rows], matrices[f"{layer}.lora_A"]
            add_product(shard, b.to(shard.device), a.to(shard.device), state["adapter"]["scale"])
    return set(held)
