"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, out and in.

Out, the folder is one that `peft` loads on the base model. In, a folder of ours or of `peft`'s reads as the model that
the two make together: the adapter is added to its base in fp32 while the base is loaded, shard by shard.

Shapes: r rank, I and O a layer's inputs and outputs.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rm import dist, log, lora
from rm.families import Family
from rm.folder import read_json, write_json
from rm.lora import LoraSettings
from rm.parallel import local, local_slices, whole

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score.weight"  # a reward model's head, by our name and everybody's
OUTER = "base_model.model."  # what peft puts before every name


def save(model: nn.Module, out: Path, base: str, settings: LoraSettings, family: Family) -> None:
    """Write what was trained: every adapter, and a reward model's score head. All ranks call it.

    Args:
        base: the folder that the adapters belong to, which the file names as its base.

    Where a family stores several of our layers as one tensor, `peft` knows one layer where we have adapted some of its
    parts: then there is no such folder, and a line says so.
    """
    adapted = [name.rpartition(".")[0] for name, _ in model.named_parameters() if lora.is_adapter(name)]
    stored = {family.theirs(f"{layer}.weight") for layer in adapted}
    if joined := [theirs for theirs in stored if len(family.ours(theirs)) > 1]:
        log.say(f"no {out}: {joined[0]} is several layers here, and a PEFT folder has no place for them; see the model")
        return
    tensors, targets, head = {}, set(), "lm"
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name):
            layer, _, matrix = name.rpartition(".")
            theirs = family.theirs(f"{layer}.weight").removesuffix(".weight")
            targets.add(theirs.rpartition(".")[2])
            tensors[f"{OUTER}{theirs}.{matrix}.weight"] = _on_main(parameter)
        elif name == SCORE:
            head = "reward"
            tensors[f"{OUTER}{name}"] = _on_main(parameter)
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / TENSORS, metadata={"format": "pt"})
        write_json(out / CONFIG, _config(base, settings, sorted(targets), head))
    dist.barrier()


def _config(base: str, settings: LoraSettings, targets: list[str], head: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}[head],
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).exists() else base,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "lora_dropout": settings.lora_dropout,
        "target_modules": targets,
        "modules_to_save": ["score"] if head == "reward" else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _on_main(parameter: Tensor) -> Tensor:
    """The whole parameter where it is written; all ranks take part in gathering it."""
    tensor = whole(parameter)
    return tensor.float().cpu().contiguous() if dist.is_main() else tensor


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter of a model to its layer, in fp32, then cast to what the layer holds. All ranks call it."""
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear) and not layer.merged:
            # W and B are both split by outputs: a rank's rows of the sum need its own rows of B, and all of A
            _add(local(layer.weight), local(layer.lora_B), whole(layer.lora_A), layer.scale)
            layer.merged = True


def _add(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> None:
    """weight (O, I) += scale b (O, r) a (r, I), rounded once."""
    weight.copy_(weight.float() + scale * (b.float() @ a.float()))


def base_of(folder: str | Path) -> Path | None:
    """The folder of the base model, where `folder` holds an adapter; None where it holds a model of its own."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or any(folder.glob("model*.safetensors")):
        return None
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise ValueError(
            f"{folder} is an adapter without its base: {CONFIG} names {base!r} as base_model_name_or_path, which is no "
            "folder here; put the base there, or correct the entry"
        )
    return Path(base)


@torch.no_grad()
def add(parameters: dict[str, Tensor], folder: Path, family: Family) -> set[str]:
    """Add the adapter in `folder` to the parameters of its base, sharded or not.

    Returns:
        The parameters that the folder brings whole, such as a reward model's score head.
    """
    scale = _scales(folder)
    try:
        with safe_open(folder / TENSORS, "pt") as stored:
            low, full = _match(parameters, stored.keys(), folder, family)
            for name, module in low.items():
                target, (a, b) = parameters[name], (stored.get_slice(f"{module}.lora_{x}.weight") for x in "AB")
                rank = a.get_shape()[0]
                if (b.get_shape(), a.get_shape()) != ([target.shape[0], rank], [rank, target.shape[1]]):
                    got = f"B {b.get_shape()} and A {a.get_shape()} on {tuple(target.shape)}"
                    raise ValueError(f"{folder} belongs to another base: {module} has {got}")
                if local(target).numel():  # with more ranks than rows, some have none
                    b, a = b[local_slices(target)[:1]].to(target.device), a[:].to(target.device)
                    _add(local(target), b, a, scale(module, rank))
            for name, key in full.items():
                if tuple(stored.get_slice(key).get_shape()) != tuple(parameters[name].shape):
                    raise ValueError(f"{folder} belongs to another base: {key} is not {tuple(parameters[name].shape)}")
                if local(parameters[name]).numel():
                    local(parameters[name]).copy_(stored.get_slice(key)[local_slices(parameters[name])])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / TENSORS} is not a whole safetensors file ({error}): copy it again") from error
    return set(full)


def _match(
    parameters: dict[str, Tensor], keys: list[str], folder: Path, family: Family
) -> tuple[dict[str, str], dict[str, str]]:
    """(our parameter -> the module whose A and B add to it, our parameter -> the tensor that replaces it)."""
    low, full, unknown = {}, {}, []
    for key in keys:
        module, is_low, _ = key.partition(".lora_")
        theirs = key.removeprefix(OUTER).replace(".modules_to_save", "")
        ours = family.ours(f"{module.removeprefix(OUTER)}.weight" if is_low else theirs)
        if len(ours) > 1:
            raise ValueError(f"{folder} adapts {module}, which is several layers here: merge it with peft first")
        if ours and ours[0] in parameters:
            (low if is_low else full)[ours[0]] = module if is_low else key
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
