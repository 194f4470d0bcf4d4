"""Saving models as Hugging Face folders: safetensors, config.json, and the tokenizer's files.

`save` gathers one tensor at a time. Names are those of `rm.hf.weights`, which reads such folders.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor
from rm.files import sha256, sync, sync_files, write_json
from rm.hf import checksums, families, hub
from rm.hf.adapter import is_score
from rm.hf.families.phi3 import with_long_factors
from rm.hf.families.rules import WITH_TWO_LAYERS
from rm.hf.folder import TextFiles, describe, forget_code
from rm.hf.safetensors_file import save_tensors
from rm.hf.weights import base_folder, read_config
from rm.model import lora

NOT_IN_TRANSFORMERS = (
    "GraniteForSequenceClassification",
    "GraniteMoeHybridForSequenceClassification",
    *WITH_TWO_LAYERS,
)
MAX_SHARD_BYTES = 5 * 10**9  # of a file that is written; only a single larger tensor exceeds it


def save(
    model: nn.Module,
    out: str | Path,
    source: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    texts: TextFiles | None = None,
) -> None:
    """Write a Hugging Face folder, completely or not at all; it replaces a model that `out` holds. All ranks call it.

    Rank 0 holds the tensors of one file at a time, other ranks one tensor. Adapters must have been merged.

    Args:
        source: the folder that the model was loaded from; its config.json (an adapter's: its base's) and its tokenizer
            are written too.
        dtype: of the weights in the files, except the score head, which is always fp32.
        max_shard_bytes: limit on the size of a file; only a single larger tensor exceeds it.
        texts: of the training; None: the tokenizer's files are copied as they are.
    """
    config, source_family, hf = read_config(source)
    family = families.find(hf)  # of the folder that is written
    assert all(layer.merged for layer in model.modules() if isinstance(layer, lora.LoRALinear))
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if not lora.is_adapter(name) and name.partition(".")[0] not in model.training_modules
    }

    # Of every checkpoint tensor, the parameters that it holds, its dtype and its size in bytes.
    names_of, dtypes, sizes = {}, {}, {}
    for name in parameters:
        hf_name = family.checkpoint_name(name)
        names = family.parameter_names(hf_name)
        names_of[hf_name] = names
        dtypes[hf_name] = torch.float32 if is_score(name) else dtype
        sizes[hf_name] = sum(parameters[part].numel() for part in names) * dtypes[hf_name].itemsize
    shards, digests = _plan_shards(sizes, max_shard_bytes), {}

    with replaced_folder(Path(out)) as folder:
        in_order = [(file, hf_name) for file, hf_names in shards.items() for hf_name in hf_names]
        shown = dist.progress(in_order, f"saving {out}", "tensors")
        for file, of_file in itertools.groupby(shown, key=lambda item: item[0]):
            tensors = {}
            for _, hf_name in of_file:
                # All ranks take part in gathering a parameter. It is cast before, on its device: a copy to the host
                # would cast on one core, and in bfloat16 there is half as much to gather and to copy.
                parts = [full_tensor(parameters[name].detach().to(dtypes[hf_name])) for name in names_of[hf_name]]
                if dist.is_main():
                    parts = [part.cpu() for part in parts]
                    tensors[hf_name] = family.layout(hf_name).join(parts, config.n_kv_heads).contiguous()
            if dist.is_main():
                save_tensors(tensors, folder / file)
                digests[file] = sha256(folder / file)
            # The others wait here, in gloo, and not in NCCL's next gather, which has ten minutes from its start.
            dist.barrier()
        if dist.is_main():
            if len(shards) > 1:
                weight_map = {hf_name: file for file, hf_names in shards.items() for hf_name in hf_names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                write_json(folder / "model.safetensors.index.json", index)
            architecture = save_description(model, folder, source, dtype, texts)
            if architecture in NOT_IN_TRANSFORMERS:
                dist.say(f"transformers has no {architecture}: open {out} as docs/exports.md says")
            forget_code(folder)
            if family is not source_family:
                dist.say(f"{out} is a {hf['model_type']}, which transformers opens as {architecture}")
            checksums.write(folder, digests)


def save_description(
    model: nn.Module, folder: Path, source: str | Path, dtype: torch.dtype, texts: TextFiles | None = None
) -> str:
    """Write all files of a Hugging Face folder but the weights; the arguments are as for `save`.

    Returns:
        The name of the model's class in transformers.
    """
    config, source_family, hf = read_config(source)
    family = families.find(hf)
    hf["vocab_size"] = model.config.vocab_size  # which may have new tokens
    if config.long_ropes and model.config.ropes == config.long_ropes:
        hf = with_long_factors(hf)
    architecture, tokenizer = family.classes[model.head], hub.tokenizer_folder(source)
    if model.head == "reward" and config.score == "two layers":
        architecture = next(name for name in hf["architectures"] if name in WITH_TWO_LAYERS)
    describe(folder, base_folder(source), tokenizer, hf, architecture, model.head, dtype, texts, model.labels)
    if family is not source_family:
        forget_code(folder)
    return architecture


def _plan_shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> its tensors, in order; a new file starts where the next tensor would exceed `limit` bytes."""
    shards, filled = [[]], 0
    for hf_name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(hf_name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": hf_names for i, hf_names in enumerate(shards, 1)}


@contextlib.contextmanager
def replaced_folder(out: Path, described_by: str = "config.json") -> Iterator[Path]:
    """A new folder next to `out` to write into. It replaces `out` if the block succeeds, and is deleted if it fails.

    All ranks call it.

    Args:
        described_by: the file that `out` has to hold, or to have held when its checksums were written; any other
            folder that is not empty is left as it is.
    """
    is_one = (out / described_by).is_file() or (out.is_dir() and described_by in checksums.read(out))
    is_one = is_one and not checkpoint.is_checkpoint(out)
    if out.exists() and not is_one and (out.is_file() or any(out.iterdir())):
        kind = "a model" if described_by == "config.json" else "an adapter"
        raise ValueError(f"{out} exists and is not {kind}, so it is not replaced: choose another path or remove it")
    writing, old = out.with_name(f".{out.name}.writing"), out.with_name(f".{out.name}.old")
    try:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)  # left by a run that was killed
            writing.mkdir(parents=True)
        yield writing
        if dist.is_main():
            sync_files(writing)  # before it has the name that says that it is complete
            # A rename cannot replace a folder that is not empty: move the old one away first.
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(out, old)
            os.replace(writing, out)
            sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)
    # No rank may read `out` before it is complete.
    dist.barrier()
