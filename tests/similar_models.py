"""Tiny reward models with contracts, which differ in their weights only, as trainings with other seeds leave them."""

from pathlib import Path

import torch

from rm.data.dataset import TextSettings
from rm.distributed import process_group as dist
from rm.scoring import contract
from tests import text_fixtures, tiny


@torch.no_grad()
def write(folder: Path, seed: int, **statistics) -> Path:
    """One of the models; its contract states `reward_mean`, `reward_std` and `reward_set` where they are given."""
    text_fixtures.byte_level(folder)
    model, generator = tiny.reward_model("llama", vocab_size=400, max_position_embeddings=512), torch.Generator()
    generator.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    with dist.session(0):
        contract.write(folder, TextSettings(max_length=200), torch.float32, statistics)
    return folder
