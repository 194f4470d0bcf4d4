"""A checkpoint on disk: a folder that is complete or does not exist, of safetensors and JSON only.

    step_500/rank_00000.safetensors    a rank's shard of every parameter, as parameter/NAME, and of its optimizer
                                       state, as exp_avg/NAME, exp_avg_sq/NAME
    step_500/state.json                the step; where each shard is in its parameter; size and sha256 of every file
    step_500/COMPLETE                  the sha256 of state.json
    step_500/config.json, ...          the files that make the folder a model's (`rm.hf.checkpoint_folder`)

Every rank writes its own file (`write`) into a folder with a hidden name; one rank then describes the files and renames
the folder (`publish`). A resumed run needs nothing else: learning rate, data order and dropout are functions of
(seed, step). A parameter that has not been trained yet has no optimizer state. The frozen base below adapters is left
out: it is loaded from the folder that it came from.
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

from rm.distributed import process_group as dist
from rm.distributed.sharding import is_dtensor, local, local_slices
from rm.files import names_file, read_json, read_whole, sha256, sync, write_json
from rm.json_keys import Key, check_keys

FORMAT = 2
COMPLETE = "COMPLETE"
COUNT = Key(int, minimum=0)
FILE_KEYS = {
    "bytes": Key(int, minimum=0, required=True),
    "sha256": Key(str, required=True),
    "slices": Key(dict, items=Key(list, items=Key(list, items=COUNT)), required=True),
}
PARAMETER_KEYS = {
    "shape": Key(list, items=COUNT, required=True),
    "numbers": Key(dict, items=Key(float), required=True),
    "arrays": Key(list, items=Key(str), required=True),
}
BEST_KEYS = {
    "step": COUNT,
    "value": Key(float),
    "evaluated_step": COUNT,
    "patience_counter": Key(int, minimum=0, required=True),
    "held_out": Key(dict),
}
KEYS = {  # of state.json
    "format": Key(int, only=(FORMAT,), required=True),
    "world_size": Key(int, minimum=1, required=True),
    "parameters": Key(dict, items=Key(dict, keys=PARAMETER_KEYS), required=True),
    "files": Key(dict, items=Key(dict, keys=FILE_KEYS), required=True),
    "step": Key(int, minimum=0, required=True),
    "unlogged_sums": Key(list, items=Key(dict, items=Key(float)), required=True),
    "identity": Key(dict, keys={"settings": Key(dict, required=True)}, others=True, required=True),
    "best": Key(dict, keys=BEST_KEYS),
    "own": Key(dict),  # of a changed loop
    "adapter": Key(dict, keys={"base": Key(str, required=True), "scale": Key(float, required=True)}),
}


class CorruptCheckpoint(ValueError):
    """A checkpoint whose files are missing, incomplete or changed."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of the training state, in host memory."""

    tensors: dict[str, Tensor]  # "parameter/NAME", "exp_avg/NAME" ... -> shard
    slices: dict[str, list]  # NAME -> [[start, stop] of every dimension], of the shards that this rank writes
    parameters: dict[str, dict]  # NAME -> shape, scalar optimizer state; the same on every rank


def snapshot(
    saved: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, pinned: dict[str, Tensor] | None = None
) -> Snapshot:
    """Copy parameters and optimizer state to host memory. Nothing is written yet.

    Args:
        saved: the parameters that a checkpoint holds, by name.
        pinned: the pinned memory of the last snapshot, which is overwritten; to be kept for the next. Unused on a CPU.
    """
    pinned = {} if pinned is None else pinned
    tensors, slices, parameters = {}, {}, {}
    for name, parameter in saved.items():
        state = optimizer.state.get(parameter, {})
        numbers = {kind: float(value) for kind, value in state.items() if value.ndim == 0}
        arrays = {"parameter": parameter} | {kind: value for kind, value in state.items() if value.ndim}
        parameters[name] = {"shape": list(parameter.shape), "numbers": numbers, "arrays": list(arrays)}
        if _is_first_copy(parameter):
            slices[name] = [[s.start, s.stop] for s in local_slices(parameter)]
            for kind, value in arrays.items():
                tensors[f"{kind}/{name}"] = _to_host(local(value), f"{kind}/{name}", pinned)
    if pinned:
        torch.cuda.current_stream().synchronize()  # the copies are asynchronous
    return Snapshot(tensors, slices, parameters)


def _to_host(value: Tensor, key: str, pinned: dict[str, Tensor]) -> Tensor:
    """A copy in host memory: from a GPU in pinned memory, to which copies are several times faster.

    Pinning takes as long as copying, so that it is done once.
    """
    if not value.is_cuda:
        return value.to("cpu", copy=True)
    if key not in pinned:
        pinned[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned[key].copy_(value, non_blocking=True)


def write(folder: Path, rank: int, snapshot: Snapshot) -> None:
    """Write one rank's file and a description of it, and flush both to disk."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank_{rank:05}.safetensors"
    try:
        save_file(snapshot.tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    sync(file)
    description = {"bytes": file.stat().st_size, "sha256": sha256(file), "slices": snapshot.slices}
    write_json(_description_file(folder, rank), description)


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write small files beside the ranks' files, and flush them to disk. One rank calls it."""
    for name, content in contents.items():
        with names_file(folder / name):
            (folder / name).write_bytes(content)
        sync(folder / name)


def publish(folder: Path, final: Path, state: dict, snapshot: Snapshot) -> None:
    """Write state.json for the files of all ranks, and rename the folder. One rank calls it, once all have written.

    Args:
        state: goes into state.json.
    """
    files = {}
    for rank in range(dist.world_size()):
        file = _description_file(folder, rank)
        if not file.is_file():
            raise OSError(f"{file} does not exist: --output_dir must be a folder that all machines share")
        files[f"rank_{rank:05}.safetensors"] = read_json(file)
        file.unlink()
    header = {"format": FORMAT, "world_size": dist.world_size()}
    write_json(folder / "state.json", header | state | {"parameters": snapshot.parameters, "files": files})
    (folder / COMPLETE).write_text(sha256(folder / "state.json") + "\n")
    sync(folder / COMPLETE)
    sync(folder)
    if final.exists():  # a corrupt one, or the same
        remove(final)
    os.rename(folder, final)
    sync(final.parent)


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / "state.json").is_file()


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, valid or corrupt."""
    found = [f for f in checkpoints.glob("step_*") if f.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder is never taken for a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read(checkpoint: Path) -> dict:
    """A checkpoint's state.json. Raises CorruptCheckpoint if it, or the size of a file that it lists, has changed."""
    mark, file = checkpoint / COMPLETE, checkpoint / "state.json"
    try:
        if not mark.is_file():
            raise CorruptCheckpoint(f"{checkpoint} has no {COMPLETE}")
        state = _checked(file, mark)
        for name, description in state["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != description["bytes"]:
                raise CorruptCheckpoint(f"{checkpoint / name} has {size} bytes instead of {description['bytes']}")
    except OSError as error:
        raise CorruptCheckpoint(f"{checkpoint} cannot be read: {error}") from error
    return state


def _checked(file: Path, mark: Path) -> dict:
    """The content of a state.json, of which `mark` has the digest; CorruptCheckpoint if it is not as it was written."""
    try:
        if read_whole(mark) != f"{hashlib.sha256(read_whole(file)).hexdigest()}\n".encode():
            raise ValueError(f"{file} has changed since it was written")
        state = read_json(file)
    except ValueError as error:
        raise CorruptCheckpoint(str(error)) from error
    if state.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{file.parent} has format {state['format']!r}, this version reads {FORMAT}")
    try:
        check_keys(file, state, KEYS)
    except ValueError as error:
        raise CorruptCheckpoint(str(error)) from error
    for name, one in state["parameters"].items():
        if "exp_avg" in one["arrays"] and "step" not in one["numbers"]:
            raise CorruptCheckpoint(f"{file} lacks the number of AdamW's steps of {name}")
    if elsewhere := [name for name in state["files"] if Path(name).name != name]:
        raise CorruptCheckpoint(f"{file} names {elsewhere[0]!r}: only files of the same folder are read")
    return state


def verify(checkpoint: Path, state: dict) -> None:
    """Hash this rank's share of the files. Raises CorruptCheckpoint if one has changed since it was written."""
    for name in sorted(state["files"])[dist.rank() :: dist.world_size()]:
        try:
            digest = sha256(checkpoint / name)
        except OSError as error:
            raise CorruptCheckpoint(f"{checkpoint / name} cannot be read: {error}") from error
        if digest != state["files"][name]["sha256"]:
            raise CorruptCheckpoint(f"{checkpoint / name} does not have its checksum")


@torch.no_grad()
def load(
    saved: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, checkpoint: Path, state: dict
) -> None:
    """Fill parameters and optimizer from a checkpoint of any number of ranks: each reads what overlaps its shards.

    Args:
        optimizer: None to fill the parameters only.
    """
    if unknown := [name for name in saved if name not in state["parameters"]]:
        raise CorruptCheckpoint(f"{checkpoint} does not hold {unknown[0]}")
    arrays = {}  # "parameter/NAME" ... -> (tensor to fill, NAME)
    for name, parameter in saved.items():
        arrays[f"parameter/{name}"] = parameter, name
        if optimizer is None:
            continue
        stored = state["parameters"][name]
        kinds, dtypes = [kind for kind in stored["arrays"] if kind != "parameter"], getattr(optimizer, "dtypes", {})
        values = {kind: torch.zeros_like(parameter, dtype=dtypes.get(kind)) for kind in kinds}
        arrays |= {f"{kind}/{name}": (value, name) for kind, value in values.items()}
        values |= {kind: torch.tensor(number, device=parameter.device) for kind, number in stored["numbers"].items()}
        if values:
            optimizer.state[parameter] = values
    filled = dict.fromkeys(arrays, 0)
    for file, description in state["files"].items():
        try:
            with safe_open(checkpoint / file, "pt") as tensors:
                for key, (tensor, name) in arrays.items():
                    if name in description["slices"]:
                        filled[key] += _copy_overlap(tensors, key, tensor, description["slices"][name])
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CorruptCheckpoint(f"{checkpoint / file} is not as state.json says: {error}") from error
    incomplete = [key for key, (tensor, _) in arrays.items() if filled[key] != local(tensor).numel()]
    if incomplete:
        raise CorruptCheckpoint(f"{checkpoint} does not hold all of {', '.join(incomplete[:5])}")


def _copy_overlap(tensors: safe_open, key: str, tensor: Tensor, stored: list) -> int:
    """Copy the overlap of a file's shard and this rank's shard; return how many values it has.

    Args:
        stored: [start, stop] of every dimension of the file's shard within the full tensor.
    """
    own = local_slices(tensor)
    overlap = [(max(s.start, start), min(s.stop, stop)) for s, (start, stop) in zip(own, stored, strict=True)]
    if any(start >= stop for start, stop in overlap):
        return 0
    target = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(overlap, own, strict=True))
    source = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, stored, strict=True))
    part = local(tensor)[target]
    part.copy_(tensors.get_slice(key)[source])
    return part.numel()


def _is_first_copy(parameter: Tensor) -> bool:
    """Whether this rank writes its shard: where several ranks hold the same one (HSDP), the first of them does."""
    if not is_dtensor(parameter):
        return dist.is_main()
    dimensions = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in dimensions if placement.is_replicate())


def _description_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.json"
