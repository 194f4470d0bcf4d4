"""LoRA adapters as PEFT folders, adapter_config.json and adapter_model.safetensors: saving, loading, merging.

A folder that is saved here can be loaded by `peft` on top of the base model. A folder that was saved here or by `peft`
is loaded as the base model with the adapter merged: the adapter is added in fp32 while the base is loaded, each rank
adding its own shard.

Where a checkpoint stores several of our layers as one fused layer (`rm.hf.families.layout`), `peft` adapts the fused
layer. Its adapter is assembled from those of our layers: the A matrices are stacked, and B is block-diagonal.

Names: see `rm.hf.families.rules`. `peft` prefixes the checkpoint names with base_model.model.

Shapes: r rank, I and O a layer's inputs and outputs.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor, local, local_slices
from rm.files import read_json, write_json
from rm.hf import outputs
from rm.hf.families.layout import Layout
from rm.hf.families.rules import Family
from rm.hf.outputs import Output
from rm.hf.safetensors_file import open_safetensors, save_tensors
from rm.json_keys import Key, check_keys
from rm.model import lora
from rm.model.lora import LoraSettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score.weight"  # a linear reward head; our parameter name and the checkpoint name in every family
PEFT_PREFIX = "base_model.model."  # peft puts it before every name
KEYS = {  # of adapter_config.json, as peft 0.21 writes it; a key that is not here is refused unless it is off
    "peft_type": Key(str, only=("LORA",)),
    "r": Key(int, minimum=1),
    "lora_alpha": Key(float),
    "use_rslora": Key(bool),
    "rank_pattern": Key(dict, items=Key(int, minimum=1)),
    "alpha_pattern": Key(dict, items=Key(float)),
    "base_model_name_or_path": Key(str),
    "revision": Key(str),
    "task_type": Key(str),
    # Others (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights, too, when peft loads the adapter.
    "init_lora_weights": Key((bool, str), only=(True, False, "gaussian", "eva", "orthogonal")),
    "bias": Key(str, only=("none",)),
    # What is adapted or replaced is read from the tensors; the rest concerns training alone.
    "target_modules": Key((str, list)),
    "modules_to_save": Key(list),
    "exclude_modules": Key((str, list)),
    "layers_to_transform": Key((int, list)),
    "layers_pattern": Key((str, list)),
    "lora_dropout": Key(float),
    "inference_mode": Key(bool),
    "fan_in_fan_out": Key(bool),
    "auto_mapping": Key(dict),
    "peft_version": Key(str),
    "eva_config": Key(dict),
    "loftq_config": Key(dict),
    "runtime_config": Key(dict),
    "megatron_core": Key(str),
    "qalora_group_size": Key(int),
}


def check_finite(file: Path, hf_name: str, head: Tensor) -> None:
    """Raise ValueError where a reward head makes every reward infinite or NaN."""
    if not head.isfinite().all():
        raise ValueError(f"{file}: {hf_name}, the reward head, holds numbers that are not finite: copy the file again")


def is_score(name: str) -> bool:
    """Whether a parameter of this name belongs to a reward model's head."""
    return name.startswith("score.")


def save(model: nn.Module, out: Path, base: str, settings: LoraSettings, family: Family) -> None:
    """Write what was trained: all adapters and, of a reward model, the score head. All ranks call it.

    Args:
        base: the folder or hub id of the base model, written to adapter_config.json.
    """
    tensors, ranks, transposed = _adapters(model, family)
    if model.head == "reward":
        for name, parameter in model.score.named_parameters(prefix="score"):
            tensors[f"{PEFT_PREFIX}{name}"] = _gather(parameter)
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, out / TENSORS)
        write_json(out / CONFIG, _config(base, settings, ranks, transposed, model.head))
    dist.barrier()


def _config(base: str, settings: LoraSettings, ranks: dict[str, int], transposed: bool, head: str) -> dict:
    """The content of adapter_config.json.

    The adapter of a fused layer has the sum of the ranks of ours; its alpha is set so that the scale stays the same.

    Args:
        ranks: module name (the last component of the layer's name) -> rank of its adapter.
        transposed: the checkpoint stores the adapted layers' weights as (in, out).
    """
    fused = {leaf: rank for leaf, rank in ranks.items() if rank != settings.lora_r}
    exponent = 0.5 if settings.use_rslora else 1  # the scale is alpha / rank ** exponent
    return {
        "peft_type": "LORA",
        "task_type": {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}[head],
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).exists() else base,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "rank_pattern": fused,
        "alpha_pattern": {leaf: settings.lora_scale * rank**exponent for leaf, rank in fused.items()},
        "use_rslora": settings.use_rslora,
        "lora_dropout": settings.lora_dropout,
        "target_modules": sorted(ranks),
        "modules_to_save": ["score"] if head == "reward" else None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _adapters(model: nn.Module, family: Family) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    """Gather all adapters of a model.

    Returns:
        A and B matrices by their names in `peft`; module name (last component) -> rank; whether the checkpoint stores
        the adapted layers' weights transposed.
    """
    tensors, ranks, transposed = {}, {}, False
    adapted = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, lora.LoRALinear)]
    # A fused checkpoint layer holds several adapted layers, but has one adapter.
    hf_names = dict.fromkeys(family.checkpoint_name(name) for name in adapted)
    for hf_name in hf_names:
        layout = family.layout(hf_name)
        parts = [model.get_submodule(name.removesuffix(".weight")) for name in family.parameter_names(hf_name)]
        a, b = _fused(parts, layout, model.config.n_kv_heads)
        hf_module = hf_name.removesuffix(".weight")
        tensors[f"{PEFT_PREFIX}{hf_module}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{hf_module}.lora_B.weight"] = b
        ranks[hf_module.rpartition(".")[2]] = len(a)
        transposed = transposed or layout.transposed
    return tensors, ranks, transposed


def _fused(parts: list[nn.Linear], layout: Layout, kv_heads: int) -> tuple[Tensor, Tensor]:
    """A and B of the one checkpoint layer that holds `parts`, some or all of which have adapters of equal rank."""
    adapted = [part for part in parts if isinstance(part, lora.LoRALinear)]
    a = torch.cat([_gather(part.lora_A) for part in adapted])
    rank = len(a) // len(adapted)
    # The rows of B are outputs: zero for parts without an adapter. Its columns are the rows of A.
    blocks = [a.new_zeros(part.out_features, len(a)) for part in parts]
    for block, part in zip(blocks, parts, strict=True):
        if part in adapted:
            first = adapted.index(part) * rank
            block[:, first : first + rank] = _gather(part.lora_B)
    # peft stores A and B of a Conv1D like those of a linear layer, not transposed.
    return a, replace(layout, transposed=False).join(blocks, kv_heads)


def _gather(parameter: Tensor) -> Tensor:
    """The full parameter; on the main rank, which writes it, in fp32 on the CPU. All ranks call it."""
    tensor = full_tensor(parameter)
    return tensor.float().cpu().contiguous() if dist.is_main() else tensor


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter of a model to its layer's weight, in fp32, rounded once to the weight's dtype.

    All ranks call it.
    """
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear) and not layer.merged:
            # W and B are both sharded by rows (outputs): a rank needs its own rows of B, and all of A.
            add_product(local(layer.weight), local(layer.lora_B), full_tensor(layer.lora_A), layer.scale)
            layer.merged = True


def add_product(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> None:
    """weight (O, I) += scale b (O, r) a (r, I), computed in fp32 and rounded once."""
    weight.copy_(weight.float() + scale * (b.float() @ a.float()))


@torch.no_grad()
def add(
    parameters: dict[str, Tensor],
    folder: Path,
    family: Family,
    kv_heads: int,
    head_is_embedding: bool,
    chosen: Output = None,
) -> set[str]:
    """Add the adapter in `folder` to the parameters of its base model, sharded or not.

    Args:
        head_is_embedding: the model is a language model that ties its head to the embedding.
        chosen: which output of a reward head that has several is read.

    Returns:
        Names of the parameters that the folder replaces, such as a reward model's score head.

    Raises:
        ValueError: the adapter is of a kind that is not implemented, belongs to another base model, or is damaged.
    """
    scale_of = _read_scales(folder)
    with open_safetensors(folder / TENSORS) as stored:
        adapted, replaced = _match(parameters, stored.keys(), folder, family, head_is_embedding)
        for name, key in replaced.items():
            parameter, shape = parameters[name], tuple(parameters[name].shape)
            values = stored.get_slice(key)
            stored_shape = tuple(values.get_shape())
            if name == SCORE and stored_shape[1:] == shape[1:] and shape[0] == 1:
                outputs.check(folder, key, stored_shape[0], chosen)
                if stored_shape[0] > 1:
                    values = outputs.one_of(values[:], chosen)
            elif stored_shape != shape:
                raise ValueError(f"{folder} belongs to another base: {key} has the shape {stored_shape}, not {shape}")
            if is_score(name):
                check_finite(folder / TENSORS, key, values[:])
            # A rank's shard is empty if there are more ranks than rows.
            if local(parameter).numel():
                local(parameter).copy_(values[local_slices(parameter)])
        for module, names in adapted.items():
            a = stored.get_slice(f"{module}.lora_A.weight")
            b = stored.get_slice(f"{module}.lora_B.weight")
            targets = [parameters[name] for name in names]
            rank = a.get_shape()[0]
            rows, columns = sum(len(target) for target in targets), targets[0].shape[1]
            if (b.get_shape(), a.get_shape()) != ([rows, rank], [rank, columns]):
                raise ValueError(
                    f"{folder} belongs to another base: {module} has B {b.get_shape()} and A {a.get_shape()}, for a "
                    f"weight of {(rows, columns)}"
                )
            layout = replace(family.layout(f"{module.removeprefix(PEFT_PREFIX)}.weight"), transposed=False)
            _add_to_shards(targets, layout, kv_heads, b, a, scale_of(module, rank))
    return set(replaced)


def _add_to_shards(targets: list[Tensor], layout: Layout, kv_heads: int, b, a, scale: float) -> None:
    """Add scale B A to this rank's rows of the parameters that one checkpoint layer holds.

    Args:
        a, b: safetensors slices of the checkpoint layer's adapter.
    """
    shapes = [tuple(target.shape) for target in targets]
    for i, target in enumerate(targets):
        # A rank's shard is empty if there are more ranks than rows.
        if local(target).numel():
            block = local_slices(target)[0], slice(None)  # this rank's rows of B, all r columns
            for rows, values in layout.read(b, i, block, shapes, kv_heads):
                add_product(local(target)[rows], values.to(target.device), a[:].to(target.device), scale)


def _match(
    parameters: dict[str, Tensor], keys: list[str], folder: Path, family: Family, head_is_embedding: bool
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Match the tensors of an adapter with the parameters of a model.

    Returns:
        Module that has A and B matrices, by its name in the file -> the parameters to which B A is added, in order;
        name of a parameter that is replaced -> the tensor in the file that replaces it.

    Raises:
        ValueError: the adapter has tensors that the model has no parameters for.
    """
    adapted, replaced, unknown, matrices = {}, {}, [], Counter()
    for key in keys:
        module, is_low_rank, which = key.partition(".lora_")
        if is_low_rank and which not in ("A.weight", "B.weight"):
            kind = "adapts embeddings" if which.startswith("embedding") else "is more than B A"
            raise ValueError(f"{folder}: the adapter {kind} ({key}), which is not implemented")
        if ".token_adapter." in key:
            raise ValueError(
                f"{folder}: the adapter trains single tokens' embeddings ({key}), which is not implemented"
            )
        if is_low_rank:
            hf_name = f"{module.removeprefix(PEFT_PREFIX)}.weight"
        else:
            # peft writes the weight of an adapted LM head, too: its vocabulary may have grown.
            hf_name = key.removeprefix(PEFT_PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")
        names = family.parameter_names(hf_name)
        if head_is_embedding and names in (["embed.weight"], ["lm_head.weight"]):
            raise ValueError(
                f"{folder}: the adapter replaces {key}, and its base ties embedding and head, which peft unties: not "
                f"implemented"
            )
        in_model = bool(names) and parameters.keys() >= set(names)
        if in_model and is_low_rank:
            adapted[module] = names
            matrices[module] += 1
        elif in_model and len(names) == 1:
            if names[0] in replaced:
                raise ValueError(f"{folder}: {replaced[names[0]]} and {key} are the same weight: remove one")
            replaced[names[0]] = key
        elif names and is_score(names[0]):
            raise ValueError(f"{folder} is a reward model's adapter ({key}), not a language model's")
        # A reward model has no use for a language model's head.
        elif names != ["lm_head.weight"]:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{folder} belongs to another base: it has {len(unknown)} unknown tensors, such as {unknown[0]}"
        )
    if incomplete := [module for module, count in matrices.items() if count != 2]:
        raise ValueError(f"{folder / TENSORS} has only one of A and B for {incomplete[0]}: copy or download it again")
    return adapted, replaced


def _read_scales(folder: Path) -> Callable[[str, int], float]:
    """Read adapter_config.json; raise ValueError for kinds of adapters that are more than scale B A.

    Returns:
        A function (module name in the file, rank) -> scale.
    """
    file = folder / CONFIG
    config = read_json(file)
    check_keys(file, config, KEYS)
    alpha_of, rank_of = _by_pattern(file, config, "alpha_pattern"), _by_pattern(file, config, "rank_pattern")
    default_alpha = config["lora_alpha"] if config.get("lora_alpha") is not None else 8

    def scale_of(module: str, rank: int) -> float:
        name = module.removeprefix(PEFT_PREFIX)
        declared = rank_of(name, config.get("r"))
        if rank == 0 or declared not in (None, rank):
            raise ValueError(
                f"{file}: the rank of {module} is {declared}, and its tensors have {rank}: restore the file"
            )
        return alpha_of(name, default_alpha) / (rank**0.5 if config.get("use_rslora") else rank)

    return scale_of


def _by_pattern(file: Path, config: dict, key: str) -> Callable[[str, float | None], float | None]:
    """A function (module name, default) -> the value of the first pattern that matches the name, or the default."""
    values = {}
    for pattern, value in (config.get(key) or {}).items():
        # Matching may take years where much can match in several ways: repetitions, options, alternatives.
        # Flags, as of (?x: ), change what is a repetition.
        if re.search(r"\)[*+{]|\(\?[a-zA-Z-]", pattern) or len(re.findall(r"[*+{(]|(?<!\()\?", pattern)) > 4:
            raise ValueError(
                f"{file}: {key} {pattern!r} repeats a group, sets flags, or has more than four groups and repetitions: "
                f"write it as several patterns"
            )
        try:
            # As peft has it (get_pattern_key): the name's last components, or, behind ^, the name from its beginning.
            values[re.compile(rf"(.*\.)?({pattern})$")] = value
        except (re.error, OverflowError) as error:  # the latter of a{9999999999}
            raise ValueError(f"{file}: {key} {pattern!r} is not a regular expression: {error}") from None
    return lambda name, default: next((value for pattern, value in values.items() if pattern.match(name)), default)
