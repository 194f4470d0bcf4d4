"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, which `peft` loads on the base model."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from rm import dist, lora, weights
from rm.folder import write_json
from rm.lora import LoraSettings
from rm.parallel import whole


def save(model: nn.Module, out: Path, settings: LoraSettings) -> None:
    """Write what was trained: every adapter, and a reward model's score head. All ranks call it.

    Args:
        settings: LoraSettings, and `model_name_or_path`, the base that the adapters belong to.
    """
    _, family, _ = weights.read_config(settings.model_name_or_path)
    tensors, targets, head = {}, set(), "lm"
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name):
            layer, _, matrix = name.rpartition(".")
            theirs = family.theirs(f"{layer}.weight").removesuffix(".weight")
            targets.add(theirs.rpartition(".")[2])
            tensors[f"base_model.model.{theirs}.{matrix}.weight"] = _on_main(parameter)
        elif name == weights.SCORE:
            head = "reward"
            tensors[f"base_model.model.{weights.SCORE}"] = _on_main(parameter)
    if dist.is_main():
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}[head],
            "base_model_name_or_path": settings.model_name_or_path,
            "r": settings.lora_r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "target_modules": sorted(targets),
            "modules_to_save": ["score"] if head == "reward" else None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_json(out / "adapter_config.json", config)
    dist.barrier()


def _on_main(parameter: Tensor) -> Tensor:
    """The whole parameter where it is written; all ranks take part in gathering it."""
    tensor = whole(parameter)
    return tensor.float().cpu().contiguous() if dist.is_main() else tensor
