"""A checkpoint on disk: a folder that is there whole or not at all, in safetensors and JSON alone.

    step_500/rank_00000.safetensors    a rank's shard of every parameter, as parameter/NAME, and of its optimizer
                                       state, as exp_avg/NAME, exp_avg_sq/NAME
    step_500/state.json                the step; where each shard lies in its parameter; size and sha256 of every file
    step_500/COMPLETE                  the sha256 of state.json

Every rank writes its own file (`write`) into a folder with a hidden name; one rank then describes them and renames the
folder (`publish`). All that a step needs of the past is here: learning rate, data order and dropout are functions of
(seed, step). A parameter without optimizer state is normal, it has not been trained yet; the frozen base below
adapters is left out, it comes again from where it came from.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm.distributed import process_group as dist
from rm.distributed.sharding import local, local_slices
from rm.files import feed, read_json, write_json

FORMAT = 1
COMPLETE = "COMPLETE"


class CorruptCheckpoint(ValueError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of the training state, in host memory."""

    tensors: dict[str, Tensor]  # "parameter/NAME", "exp_avg/NAME" ... -> shard
    slices: dict[str, list]  # NAME -> [[start, stop] of every dimension], of what this rank writes
    parameters: dict[str, dict]  # NAME -> shape, numbers of the optimizer state; the same on every rank


def snapshot(saved: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copy what the next steps may change. Nothing is written yet."""
    tensors, slices, parameters = {}, {}, {}
    for name, parameter in saved.items():
        state = optimizer.state.get(parameter, {})
        numbers = {kind: float(value) for kind, value in state.items() if value.ndim == 0}
        arrays = {"parameter": parameter} | {kind: value for kind, value in state.items() if value.ndim}
        parameters[name] = {"shape": list(parameter.shape), "numbers": numbers, "arrays": list(arrays)}
        if _is_first_copy(parameter):
            slices[name] = [[s.start, s.stop] for s in local_slices(parameter)]
            for kind, value in arrays.items():
                tensors[f"{kind}/{name}"] = local(value).to("cpu", copy=True)
    return Snapshot(tensors, slices, parameters)


def write(folder: Path, rank: int, taken: Snapshot) -> None:
    """Write one rank's file, and a description of it beside, and see them to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank_{rank:05}.safetensors"
    try:
        save_file(taken.tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    sync(file)
    described = {"bytes": file.stat().st_size, "sha256": _digest(file), "slices": taken.slices}
    write_json(_description(folder, rank), described)


def publish(folder: Path, final: Path, state: dict, taken: Snapshot) -> None:
    """Describe what all ranks have written into `folder`, and give it its name. One rank calls it, once all are done.

    Args:
        state: goes into state.json.
    """
    files = {}
    for rank in range(dist.world_size()):
        described = _description(folder, rank)
        if not described.is_file():
            raise OSError(f"{described} is not there: --output_dir must be one folder that all machines share")
        files[f"rank_{rank:05}.safetensors"] = read_json(described)
        described.unlink()
    whole = {"format": FORMAT, "world": dist.world_size()} | state | {"parameters": taken.parameters, "files": files}
    write_json(folder / "state.json", whole)
    (folder / COMPLETE).write_text(_digest(folder / "state.json") + "\n")
    sync(folder / COMPLETE)
    sync(folder)
    if final.exists():  # damaged, or the same
        remove(final)
    os.rename(folder, final)
    sync(final.parent)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, good or damaged."""
    found = [f for f in checkpoints.glob("step_*") if f.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def remove(checkpoint: Path) -> None:
    """Take its name away first, so that a half-removed folder is never mistaken for a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read(checkpoint: Path) -> dict:
    """A checkpoint's state.json. Raises Damaged if it, or a file that it lists, is not what was written."""
    mark, file = checkpoint / COMPLETE, checkpoint / "state.json"
    try:
        if not mark.is_file():
            raise CorruptCheckpoint(f"{checkpoint} has no {COMPLETE}")
        if mark.read_bytes() != f"{_digest(file)}\n".encode():
            raise CorruptCheckpoint(f"{file} is not as it was written")
        state = read_json(file)
        for name, described in state["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != described["bytes"]:
                raise CorruptCheckpoint(f"{checkpoint / name} has {size} bytes instead of {described['bytes']}")
    except OSError as error:
        raise CorruptCheckpoint(f"{checkpoint} cannot be read: {error}") from error
    if state["format"] != FORMAT:
        raise ValueError(f"{checkpoint} has format {state['format']}, this version reads {FORMAT}")
    return state


def verify(checkpoint: Path, state: dict) -> None:
    """Raises Damaged if one of this rank's share of the files has not the content that was written."""
    for name in sorted(state["files"])[dist.rank() :: dist.world_size()]:
        try:
            digest = _digest(checkpoint / name)
        except OSError as error:
            raise CorruptCheckpoint(f"{checkpoint / name} cannot be read: {error}") from error
        if digest != state["files"][name]["sha256"]:
            raise CorruptCheckpoint(f"{checkpoint / name} does not have its checksum")


@torch.no_grad()
def load(saved: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, checkpoint: Path, state: dict) -> None:
    """Fill parameters and optimizer from a checkpoint of any number of ranks: each rank reads what overlaps its own."""
    arrays = {}  # "parameter/NAME" ... -> (tensor to fill, NAME)
    for name, parameter in saved.items():
        arrays[f"parameter/{name}"] = parameter, name
        stored = state["parameters"][name]
        values = {kind: torch.zeros_like(parameter) for kind in stored["arrays"] if kind != "parameter"}
        arrays |= {f"{kind}/{name}": (value, name) for kind, value in values.items()}
        values |= {kind: torch.tensor(number, device=parameter.device) for kind, number in stored["numbers"].items()}
        if values:
            optimizer.state[parameter] = values
    filled = dict.fromkeys(arrays, 0)
    for file, described in state["files"].items():
        with safe_open(checkpoint / file, "pt") as tensors:
            for key, (tensor, name) in arrays.items():
                if name in described["slices"]:
                    filled[key] += _copy_overlap(tensors, key, tensor, described["slices"][name])
    lacking = [key for key, (tensor, _) in arrays.items() if filled[key] != local(tensor).numel()]
    if lacking:
        raise CorruptCheckpoint(f"{checkpoint} does not hold all of {', '.join(lacking[:5])}")


def _copy_overlap(tensors: safe_open, key: str, tensor: Tensor, theirs: list) -> int:
    """Copy what lies in a file, which holds the part `theirs`, and in this rank's part too; return how many values."""
    ours = local_slices(tensor)
    common = [(max(s.start, a), min(s.stop, b)) for s, (a, b) in zip(ours, theirs, strict=True)]
    if any(start >= stop for start, stop in common):
        return 0
    here = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(common, ours, strict=True))
    there = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, theirs, strict=True))
    part = local(tensor)[here]
    part.copy_(tensors.get_slice(key)[there])
    return part.numel()


def _is_first_copy(parameter: Tensor) -> bool:
    """Whether this rank writes its part: of several ranks that hold the same part, one does."""
    if not isinstance(parameter, DTensor):
        return dist.is_main()
    place = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in place if placement.is_replicate())


def _description(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.json"


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    feed(digest, file)
    return digest.hexdigest()
