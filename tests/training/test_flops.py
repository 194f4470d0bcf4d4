"""rm.training.flops: peaks of devices by name, and the share of them that a training reaches."""

import pytest
import torch

from rm.data.batch import BatchSettings, Loader, PackingSettings
from rm.distributed import process_group as dist
from rm.model.heads import RewardModel
from rm.training import flops
from tests import made


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_unknown(name, tflops):
    assert flops.peak_flops(name) == (tflops and tflops * 1e12)


def test_utilization_is_six_operations_a_weight_and_token_over_the_peak(monkeypatch):
    """Of long single texts without attention, but for the last layer, which computes the positions that are read."""
    monkeypatch.setattr(dist, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(dist, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(dist, "world_size", lambda: 8)
    model = made.model(RewardModel)
    examples = made.pair_examples(made.token_pairs(16))
    loader = Loader(examples, BatchSettings(global_batch_size=4), PackingSettings(), seed=0, attention_cost=0.0)
    assert flops.utilization(model, loader, 1000.0) is None  # computes in float32
    model.compute_dtype = torch.bfloat16
    weights = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in model.layers]
    last = model.layers[-1]
    ends = 2 * len(examples) / loader.lengths.sum()  # positions that are read, for each token
    behind = sum(p.numel() for p in (last.attn.o_proj.weight, *last.mlp.parameters()))
    expected = 6 * (sum(weights) - behind * (1 - ends)) * 1000 / (8 * 989e12)
    assert flops.utilization(model, loader, 1000.0) == pytest.approx(expected)
    model.layers.requires_grad_(False)
    assert flops.utilization(model, loader, 1000.0) == pytest.approx(expected * 4 / 6)
