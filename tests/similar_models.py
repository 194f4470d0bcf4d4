"""Tiny reward models with contracts, which differ in their weights only, as trainings with other seeds leave them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rm.data.dataset import TextSettings
from rm.distributed import process_group as dist
from rm.scoring import contract
from tests import text_fixtures, tiny


@torch.no_grad()
def write(folder: Path, seed: int, head: str = "linear", **statistics) -> Path:
    """One of the models; its contract states `reward_mean`, `reward_std` and `reward_set` where they are given.

    Args:
        head: "linear", or "two layers" as a Qwen2ForRewardModel has.
    """
    text_fixtures.byte_level(folder)
    model, generator = tiny.reward_model("llama", vocab_size=400, max_position_embeddings=512), torch.Generator()
    generator.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if head == "two layers":
        _replace_head(folder, generator)
    with dist.session(0):
        contract.write(folder, TextSettings(max_length=200), torch.float32, statistics)
    return folder


def _replace_head(folder: Path, generator: torch.Generator) -> None:
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    width = tensors.pop("score.weight").shape[1]
    for name, shape in {"0.weight": (width, width), "0.bias": (width,), "2.weight": (1, width), "2.bias": (1,)}.items():
        tensors[f"score.{name}"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForRewardModel"]}))
