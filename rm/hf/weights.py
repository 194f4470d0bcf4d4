"""Weights in and out: Hugging Face folders, safetensors only (a pickle can run code, safetensors cannot).

`load` gives every rank its own rows: no rank ever holds a whole model. `save` gathers one tensor at a time. A folder
with an adapter reads as the model that it makes of its base (`rm.hf.adapter`).
Every tensor is accounted for, both ways, by the key table of the model's family (`rm.hf.families`).
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor, local, local_slices
from rm.files import read_json, write_json
from rm.hf import adapter, families, hub
from rm.hf.adapter import SCORE
from rm.hf.families.layout import Layout
from rm.hf.families.rules import Family
from rm.hf.folder import describe
from rm.model import lora
from rm.model.transformer import ModelConfig

FLOATS = ("F64", "F32", "F16", "BF16")  # what a checkpoint may hold, as safetensors spells it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: str | Path) -> tuple[ModelConfig, Family, dict]:
    """The model that a folder's config.json describes, its family, and the file's content."""
    folder = foundation(folder)
    file = Path(folder) / "config.json"
    if not file.is_file():
        wrong = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise ValueError(f"{folder} {wrong}: a model is a folder with config.json and *.safetensors")
    hf = read_json(file)
    try:
        if hf.get("quantization_config"):
            raise ValueError("quantization_config: quantized weights are not implemented")
        family = families.find(hf)
        return family.config(hf), family, hf
    except KeyError as error:
        raise ValueError(f"{file}: the setting {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def foundation(folder: str | Path) -> Path:
    """The folder of the whole model that the adapter in `folder`, if it holds one, stands on."""
    base = hub.base_of(folder)
    return Path(folder) if base is None else foundation(base)


def fingerprint(folder: str | Path) -> str:
    """A hash of what tells this model from others: config.json and of every weights file its size and samples of it.

    Samples, since to read a large model takes minutes: training changes nearly every value, so they nearly always tell.
    """
    folder = Path(folder)
    if base := hub.base_of(folder):
        digest, files = hashlib.sha256(fingerprint(base).encode()), [folder / adapter.CONFIG, folder / adapter.TENSORS]
    else:
        digest, files = hashlib.sha256((folder / "config.json").read_bytes()), _files(folder)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with open(file, "rb") as content:
            for place in range(0, size, max(1, size // 64)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()


def load(model: nn.Module, folder: str | Path) -> set[str]:
    """Fill a model, sharded or not, from a folder, in the dtype that its parameters have.

    Returns:
        The parameters that the folder lacks and the caller has to initialise: {"score.weight"} or nothing.
    """
    parameters = dict(model.named_parameters())
    if base := hub.base_of(folder):
        config, family, _ = read_config(base)
        return load(model, base) - adapter.add(parameters, Path(folder), family, config.n_kv_heads)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    config, family, _ = read_config(folder)
    found = _match(shapes, Path(folder), family)
    for file in sorted({tensor.file for tensor in found}):
        with _open(file) as tensors, torch.no_grad():
            for tensor in (tensor for tensor in found if tensor.file == file):
                parts = [parameters[name] for name in found[tensor]]
                _copy(tensors.get_slice(tensor.name), family.layout(tensor.name), parts, config.n_kv_heads)
    return parameters.keys() - {name for names in found.values() for name in names}


def _copy(held, layout: Layout, parts: list[Tensor], kv_heads: int) -> None:
    """Fill this rank's share of the parameters that a tensor of a file holds; no more of it is read."""
    shapes = [tuple(parameter.shape) for parameter in parts]
    for number, parameter in enumerate(parts):
        if local(parameter).numel():  # with more ranks than rows, some have none
            for rows, values in layout.read(held, number, local_slices(parameter), shapes, kv_heads):
                local(parameter)[rows].copy_(values)


def _match(shapes: dict[str, tuple[int, ...]], folder: Path, family: Family) -> dict[Stored, list[str]]:
    """Every tensor of a folder that holds all of our parameters and nothing else -> what is ours in it, in order."""
    found, unknown = {}, []
    for tensor in _stored(folder):
        ours = family.ours(tensor.name)
        if ours and shapes.keys() >= set(ours):
            found[tensor] = ours
        elif ours == [SCORE]:
            raise ValueError(f"{folder} holds a reward model ({tensor.name}), not a language model")
        # A language model's head may lie unneeded: below a reward model, or beside a tied embedding.
        elif ours != ["lm_head.weight"] and not family.ignores(tensor.name):
            unknown.append(tensor.name)

    there = {SCORE, *(name for ours in found.values() for name in ours)}
    absent = [family.theirs(name) for name in shapes if not (name in there or lora.is_adapter(name))]
    expected = {tensor: family.layout(tensor.name).shape([shapes[n] for n in ours]) for tensor, ours in found.items()}
    unlike = [(tensor, shape) for tensor, shape in expected.items() if tensor.shape != shape]
    problems = {
        "missing": list(dict.fromkeys(absent)),
        "unknown": unknown,
        "of another shape": [f"{tensor.name} {tensor.shape} instead of {shape}" for tensor, shape in unlike],
        "of another kind": [f"{t.name} {t.dtype}" for t in found if t.dtype not in FLOATS],
    }
    listed = [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if listed:
        raise ValueError(f"{folder}: the tensors are not those of its config.json; {'; '.join(listed)}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _stored(folder: Path) -> list[Stored]:
    """Every tensor of a folder, from the headers of its files."""
    tensors = []
    for file in _files(folder):
        with _open(file) as header:
            for name in header.keys():
                piece = header.get_slice(name)
                tensors.append(Stored(file, name, tuple(piece.get_shape()), piece.get_dtype()))
    return tensors


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise ValueError(f"{index} names {_some(absent) or 'no files'}, not there: copy the folder again")
        return files
    if not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safetensors'!r})"
    raise ValueError(
        f"{folder} holds pickled weights (*.bin). Those can run code and are not read here; to convert them: "
        f'python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
    )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def save(
    model: nn.Module, out: str | Path, source: str | Path, dtype: torch.dtype, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a Hugging Face folder, whole or not at all, in place of the one that is there. All ranks call it.

    Rank 0 holds as much as one file will, the others one tensor of it. Adapters have to be merged before.

    Args:
        source: the folder that the model came from: its config.json and its tokenizer go along.
        dtype: of the weights in the files, except the score head, which is fp32 everywhere.
    """
    config, family, hf = read_config(source)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, lora.LoRALinear))
    parameters = {name: p for name, p in model.named_parameters() if not lora.is_adapter(name)}
    tensors = {theirs: family.ours(theirs) for theirs in map(family.theirs, parameters)}
    dtypes = {theirs: torch.float32 if ours == [SCORE] else dtype for theirs, ours in tensors.items()}
    count = {theirs: sum(parameters[name].numel() for name in ours) for theirs, ours in tensors.items()}
    sizes = {theirs: count[theirs] * dtypes[theirs].itemsize for theirs in tensors}
    shards = _plan(sizes, max_shard_bytes)

    with _published(Path(out)) as folder:
        for file, names in shards.items():
            held = {}
            for theirs in names:
                parts = [full_tensor(parameters[name]) for name in tensors[theirs]]
                if dist.is_main():
                    parts = [part.to("cpu", dtypes[theirs]) for part in parts]
                    held[theirs] = family.layout(theirs).join(parts, config.n_kv_heads).contiguous()
            if dist.is_main():
                save_file(held, folder / file, metadata={"format": "pt"})
        if dist.is_main():
            if len(shards) > 1:
                weight_map = {theirs: file for file, names in shards.items() for theirs in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                write_json(folder / "model.safetensors.index.json", index)
            describe(folder, foundation(source), hf, family.classes[model.head], model.head, dtype)


def _plan(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File -> its tensors, in order; a new file begins where the next tensor would exceed `limit` bytes."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into: it becomes `out` if the block ends well, and vanishes if not."""
    if out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a model: it is not replaced, choose another or remove it")
    writing, old = out.with_name(f".{out.name}.writing"), out.with_name(f".{out.name}.old")
    try:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
            writing.mkdir(parents=True)
        yield writing
        if dist.is_main():
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(out, old)
            os.replace(writing, out)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)
    dist.barrier()
