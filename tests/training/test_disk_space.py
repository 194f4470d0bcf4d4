"""rm.training.disk_space: sizes are those of what is written; a run that does not fit is warned of before it begins."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from rm.distributed import checkpoint, sharding
from rm.hf import build, saving
from rm.model import lora
from rm.model.heads import RewardModel
from rm.training import disk_space, optim
from rm.training.resume import CheckpointSettings
from tests import made, runs
from tests.ranks import run_ranks
from tests.training_runs import sharded

LORA = lora.LoraSettings(use_lora=True, lora_r=2)


@pytest.mark.parametrize("adapters", [None, LORA])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_the_size_that_was_reckoned_with(adapters, state_dtype):
    def sizes():
        model = sharded(made.model(RewardModel), sharding.ParallelSettings(), lora=adapters)
        settings = optim.OptimSettings(optimizer_state_dtype=state_dtype)
        reckoned = disk_space.checkpoint_bytes(model, settings)  # before there is any state
        optimizer = optim.adamw(model, settings)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        snapshot = checkpoint.snapshot(lora.checkpointed(model), optimizer)
        return reckoned, sum(tensor.nbytes for tensor in snapshot.tensors.values())

    ((reckoned, written),) = run_ranks(1, sizes)
    assert reckoned == written


def test_a_saved_model_has_the_size_that_was_reckoned_with(tmp_path):
    def sizes():
        folder = runs.world() / "model"
        model = build.build(RewardModel, folder, sharding.ParallelSettings(), training=build.Training(lora=LORA))
        reckoned = disk_space.model_bytes(model)
        plain = build.load(build.build(RewardModel, folder, sharding.ParallelSettings()), folder, seed=0)
        saving.save(plain, tmp_path / "out", folder, torch.float32)
        return reckoned

    (reckoned,) = run_ranks(1, sizes)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert reckoned == sum(tensors.get_tensor(name).nbytes for name in tensors.keys())


# (--save_steps, --save_total_limit, steps, checkpoints that are there) -> how many more there may be at a time
TIMES = {(2, 2, 9, 0): 3, (2, 2, 9, 2): 1, (2, 2, 5, 0): 2, (2, 0, 9, 0): 4, (0, 2, 9, 0): 1, (50, 2, 9, 3): 1}


@pytest.mark.parametrize(("case", "times"), TIMES.items())
def test_what_does_not_fit_is_warned_of(case, times, tmp_path, monkeypatch):
    save_steps, limit, steps, there = case
    for n in range(there):
        (tmp_path / "out" / "checkpoints" / f"step_{n}").mkdir(parents=True)
    model, settings = made.model(RewardModel), optim.OptimSettings()
    model.compute_dtype = torch.float32
    needed = times * disk_space.checkpoint_bytes(model, settings) + disk_space.model_bytes(model)
    warnings = []
    for free in (needed, needed - 1):
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        checkpoints = CheckpointSettings(save_steps=save_steps, save_total_limit=limit)
        warnings.append(disk_space.too_little(tmp_path / "out", model, checkpoints, settings, steps))
    assert warnings[0] is None
    assert f"at most {times} more checkpoints at a time" in warnings[1] and str(tmp_path / "out") in warnings[1]
