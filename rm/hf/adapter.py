"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, out and in.

Out, the folder is one that `peft` loads on the base model. In, a folder of ours or of `peft`'s reads as the model that
the two make together: the adapter is added to its base in fp32 while the base is loaded, shard by shard.

Where the files of a family hold several of our layers as one (`rm.hf.families.layout`), `peft` adapts that one: its A
is the A of ours one on the other, its B has a block for each of ours.

Shapes: r rank, I and O a layer's inputs and outputs.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor, local, local_slices
from rm.files import read_json, write_json
from rm.hf.families.layout import Layout
from rm.hf.families.rules import Family
from rm.model import lora
from rm.model.lora import LoraSettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score.weight"  # a reward model's head, by our name and everybody's
OUTER = "base_model.model."  # what peft puts before every name


def save(model: nn.Module, out: Path, base: str, settings: LoraSettings, family: Family) -> None:
    """Write what was trained: every adapter, and a reward model's score head. All ranks call it.

    Args:
        base: the folder that the adapters belong to, which the file names as its base.
    """
    tensors, ranks, transposed = _adapters(model, family)
    if model.head == "reward":
        tensors[f"{OUTER}{SCORE}"] = _on_main(model.score.weight)
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / TENSORS, metadata={"format": "pt"})
        write_json(out / CONFIG, _config(base, settings, ranks, transposed, model.head))
    dist.barrier()


def _config(base: str, settings: LoraSettings, ranks: dict[str, int], transposed: bool, head: str) -> dict:
    """adapter_config.json; a layer that is several of ours has the rank of all their adapters, and the same scale."""
    joined = {leaf: rank for leaf, rank in ranks.items() if rank != settings.lora_r}
    over = 0.5 if settings.use_rslora else 1  # the scale is alpha over this power of the rank
    return {
        "peft_type": "LORA",
        "task_type": {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}[head],
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).exists() else base,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "rank_pattern": joined,
        "alpha_pattern": {leaf: settings.lora_scale * rank**over for leaf, rank in joined.items()},
        "use_rslora": settings.use_rslora,
        "lora_dropout": settings.lora_dropout,
        "target_modules": sorted(ranks),
        "modules_to_save": ["score"] if head == "reward" else None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _adapters(model: nn.Module, family: Family) -> tuple[dict[str, Tensor], dict[str, int], bool]:
    """Every A and B by peft's name, the rank of every kind of layer, and whether its matrices are stored transposed."""
    tensors, ranks, transposed = {}, {}, False
    adapted = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, lora.LoRALinear)]
    for theirs in dict.fromkeys(map(family.theirs, adapted)):
        layout = family.layout(theirs)
        parts = [model.get_submodule(name.removesuffix(".weight")) for name in family.ours(theirs)]
        a, b = _joined(parts, layout, model.config.n_kv_heads)
        module = theirs.removesuffix(".weight")
        tensors |= {f"{OUTER}{module}.lora_A.weight": a, f"{OUTER}{module}.lora_B.weight": b}
        ranks[module.rpartition(".")[2]] = len(a)
        transposed |= layout.transposed
    return tensors, ranks, transposed


def _joined(parts: list[nn.Linear], layout: Layout, kv_heads: int) -> tuple[Tensor, Tensor]:
    """A and B of the one layer that a family stores in place of `parts`, some of which have adapters."""
    adapted = [part for part in parts if isinstance(part, lora.LoRALinear)]
    a = torch.cat([_on_main(part.lora_A) for part in adapted])
    rank = len(a) // len(adapted)
    blocks = [a.new_zeros(part.out_features, len(a)) for part in parts]
    for block, part in zip(blocks, parts, strict=True):
        if part in adapted:
            first = adapted.index(part) * rank
            block[:, first : first + rank] = _on_main(part.lora_B)
    return a, replace(layout, transposed=False).join(blocks, kv_heads)


def _on_main(parameter: Tensor) -> Tensor:
    """The whole parameter where it is written; all ranks take part in gathering it."""
    tensor = full_tensor(parameter)
    return tensor.float().cpu().contiguous() if dist.is_main() else tensor


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter of a model to its layer, in fp32, then cast to what the layer holds. All ranks call it."""
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear) and not layer.merged:
            # W and B are both split by outputs: a rank's rows of the sum need its own rows of B, and all of A
            _add(local(layer.weight), local(layer.lora_B), full_tensor(layer.lora_A), layer.scale)
            layer.merged = True


def _add(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> None:
    """weight (O, I) += scale b (O, r) a (r, I), rounded once."""
    weight.copy_(weight.float() + scale * (b.float() @ a.float()))


@torch.no_grad()
def add(parameters: dict[str, Tensor], folder: Path, family: Family, kv_heads: int) -> set[str]:
    """Add the adapter in `folder` to the parameters of its base, sharded or not.

    Returns:
        The parameters that the folder brings whole, such as a reward model's score head.
    """
    scale = _scales(folder)
    try:
        with safe_open(folder / TENSORS, "pt") as stored:
            low, full = _match(parameters, stored.keys(), folder, family)
            for module, names in low.items():
                a, b = (stored.get_slice(f"{module}.lora_{x}.weight") for x in "AB")
                targets, rank = [parameters[name] for name in names], a.get_shape()[0]
                rows, columns = sum(len(target) for target in targets), targets[0].shape[1]
                if (b.get_shape(), a.get_shape()) != ([rows, rank], [rank, columns]):
                    got = f"B {b.get_shape()} and A {a.get_shape()} on {(rows, columns)}"
                    raise ValueError(f"{folder} belongs to another base: {module} has {got}")
                layout = replace(family.layout(f"{module.removeprefix(OUTER)}.weight"), transposed=False)
                _add_parts(targets, layout, kv_heads, b, a, scale(module, rank))
            for name, key in full.items():
                if tuple(stored.get_slice(key).get_shape()) != tuple(parameters[name].shape):
                    raise ValueError(f"{folder} belongs to another base: {key} is not {tuple(parameters[name].shape)}")
                if local(parameters[name]).numel():
                    local(parameters[name]).copy_(stored.get_slice(key)[local_slices(parameters[name])])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / TENSORS} is not a whole safetensors file ({error}): copy it again") from error
    return set(full)


def _add_parts(targets: list[Tensor], layout: Layout, kv_heads: int, b, a, scale: float) -> None:
    """Add scale B A, which lie in a file, to the layers of ours that are one in it: to each rank's rows of them."""
    shapes = [tuple(target.shape) for target in targets]
    for number, target in enumerate(targets):
        if local(target).numel():  # with more ranks than rows, some have none
            where = local_slices(target)[0], slice(None)
            for rows, values in layout.read(b, number, where, shapes, kv_heads):
                _add(local(target)[rows], values.to(target.device), a[:].to(target.device), scale)


def _match(
    parameters: dict[str, Tensor], keys: list[str], folder: Path, family: Family
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(module whose A and B are added -> our parameters, our parameter -> the tensor that replaces it)."""
    low, full, unknown = {}, {}, []
    for key in keys:
        module, is_low, _ = key.partition(".lora_")
        theirs = key.removeprefix(OUTER).replace(".modules_to_save", "")
        ours = family.ours(f"{module.removeprefix(OUTER)}.weight" if is_low else theirs)
        if ours and parameters.keys() >= set(ours) and (is_low or len(ours) == 1):
            if is_low:
                low[module] = ours
            else:
                full[ours[0]] = key
        elif ours == [SCORE]:
            raise ValueError(f"{folder} is a reward model's adapter ({key}), not a language model's")
        elif ours != ["lm_head.weight"]:  # of no use to a reward model
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{folder} belongs to another base: it has {len(unknown)} unknown tensors, such as {unknown[0]}"
        )
    return low, full


def _scales(folder: Path) -> Callable[[str, int], float]:
    """(module, r) -> what its B A is multiplied with. Refuses the kinds of adapter that are more than B A."""
    config = read_json(folder / CONFIG)
    plain = {"peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None)}
    for name, allowed in plain.items():
        if config.get(name, allowed[-1]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {name} {config[name]!r} is not implemented, only {allowed[0]!r}")

    def scale(module: str, rank: int) -> float:
        special = config.get("alpha_pattern") or {}
        alphas = [alpha for pattern, alpha in special.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
        alpha = alphas[0] if alphas else config.get("lora_alpha", 8)
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    return scale
