"""rm.distributed.checkpoint: what a checkpoint holds, to the byte, and that each rank reads its own shards of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.model import lora
from rm.model.heads import RewardModel
from rm.training import optim
from tests import made
from tests.ranks import run_ranks
from tests.training_runs import sharded

STATE = {"step": 2, "unlogged_sums": [], "identity": {"settings": {}}, "best": None}  # as a training has it


def trained(steps: int, group_size: int | None = None, adapters: bool = False):
    """A sharded model and its optimizer after some steps with random gradients, the same for every world size."""
    parallel = sharding.ParallelSettings(shard_group_size=group_size)
    adapted = lora.LoraSettings(use_lora=True, lora_r=2) if adapters else None
    model = sharded(made.model(RewardModel), parallel, lora=adapted)
    optimizer = optim.adamw(model, optim.OptimSettings(learning_rate=0.1))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        sharding.fill(p, torch.randn(p.shape, generator=generator))
    for _ in range(steps):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
                sharding.fill(p.grad, gradient)
        optimizer.step()
    return model, optimizer


def values(model, optimizer) -> dict:
    """Every parameter and all optimizer state, in full."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = sharding.full_tensor(p)
        found |= {f"{name} {kind}": sharding.full_tensor(value) for kind, value in optimizer.state.get(p, {}).items()}
    return found


def saved(folder: Path, group_size: int | None = None, adapters: bool = False) -> dict:
    model, optimizer = trained(2, group_size, adapters)
    snapshot = checkpoint.snapshot(lora.checkpointed(model), optimizer)
    checkpoint.write(folder / ".writing", dist.rank(), snapshot)
    dist.barrier()
    if dist.is_main():
        checkpoint.publish(folder / ".writing", folder / "step_2", STATE, snapshot)
    dist.barrier()
    return values(model, optimizer)


def restored(folder: Path, group_size: int | None = None, adapters: bool = False) -> dict:
    model, optimizer = trained(0, group_size, adapters)
    state = checkpoint.read(folder / "step_2")
    checkpoint.verify(folder / "step_2", state)
    checkpoint.load(lora.checkpointed(model), optimizer, folder / "step_2", state)
    return values(model, optimizer)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("writers", "readers"), [((2, None), (4, 2)), ((4, 2), (1, None)), ((1, None), (2, 1))])
def test_any_number_of_ranks_reads_what_any_number_wrote(writers, readers, adapters, tmp_path):
    written = run_ranks(writers[0], saved, tmp_path, writers[1], adapters)[0]
    for read in run_ranks(readers[0], restored, tmp_path, readers[1], adapters):
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in written)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpoint_holds_trained_parameters_and_two_moments_only(adapters, tmp_path):
    (full,) = run_ranks(1, saved, tmp_path / "one", None, adapters)
    trains = {name for name in full if not adapters or lora.is_adapter(name) or name == "score.weight"}
    expected = 3 * 4 * sum(full[name].numel() for name in trains if " " not in name)
    run_ranks(4, saved, tmp_path / "four", 2, adapters)
    for folder in ("one", "four"):
        keys, size = set(), 0
        for file in (tmp_path / folder / "step_2").glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                keys |= set(opened.keys())
                size += sum(opened.get_tensor(key).nbytes for key in opened.keys())
        assert size == expected
        names = {name for name in trains if " " not in name}
        assert keys == {f"{kind}/{name}" for name in names for kind in ("parameter", "exp_avg", "exp_avg_sq")}


def test_state_json_describes_every_file_to_the_byte(tmp_path):
    run_ranks(2, saved, tmp_path)
    folder = tmp_path / "step_2"
    assert sorted(f.name for f in folder.iterdir()) == [
        "COMPLETE", "rank_00000.safetensors", "rank_00001.safetensors", "state.json",
    ]  # fmt: skip
    state = json.loads((folder / "state.json").read_text())
    assert state["world_size"] == 2 and state["step"] == 2
    for name, file in state["files"].items():
        assert file["bytes"] == (folder / name).stat().st_size and len(file["sha256"]) == 64


def test_a_parameter_without_optimizer_state_is_saved_and_gets_none(tmp_path):
    def round_trip():
        model, optimizer = trained(2)
        frozen = model.layers[0].mlp.up_proj.weight
        del optimizer.state[frozen]
        frozen.requires_grad_(False)  # as LISA does with a layer that is not trained at the moment
        before = values(model, optimizer)
        snapshot = checkpoint.snapshot(lora.checkpointed(model), optimizer)
        checkpoint.write(tmp_path / ".writing", 0, snapshot)
        checkpoint.publish(tmp_path / ".writing", tmp_path / "step_2", STATE, snapshot)
        return before, restored(tmp_path)

    ((before, after),) = run_ranks(1, round_trip)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_own_state_keeps_its_dtype_beside_moments_in_bfloat16(tmp_path):
    def round_trip():
        settings = optim.OptimSettings(optimizer_state_dtype="bfloat16")
        models = [sharded(made.model(RewardModel), sharding.ParallelSettings()) for _ in range(2)]
        written, read = (optim.adamw(model, settings) for model in models)
        for p in models[0].parameters():
            p.grad = torch.randn_like(p)
        written.step()
        for p in models[0].parameters():
            written.state[p]["average"] = torch.randn_like(p)
        snapshot = checkpoint.snapshot(lora.checkpointed(models[0]), written)
        checkpoint.write(tmp_path / ".writing", 0, snapshot)
        checkpoint.publish(tmp_path / ".writing", tmp_path / "step_2", STATE, snapshot)
        folder = tmp_path / "step_2"
        checkpoint.load(lora.checkpointed(models[1]), read, folder, checkpoint.read(folder))
        return [values(model, optimizer) for model, optimizer in zip(models, (written, read), strict=True)]

    ((before, after),) = run_ranks(1, round_trip)
    assert before["score.weight average"].dtype == torch.float32
    assert before["score.weight exp_avg"].dtype == torch.bfloat16
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    run_ranks(1, saved, tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with pytest.raises(ValueError, match="has format 2, this version reads 99"):
        checkpoint.read(tmp_path / "step_2")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_snapshots_of_a_gpu_reuse_pinned_memory(monkeypatch):
    """Without a GPU nothing can be pinned: what is asked for is counted."""
    empty, asked, waits = torch.empty, [], []

    def allocate(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(checkpoint, "_is_first_copy", lambda parameter: True)
    weight = torch.arange(4.0).as_subclass(OnGpu)
    saved, pinned = {"weight": weight}, {}
    optimizer = SimpleNamespace(state={weight: {"step": torch.tensor(1.0), "exp_avg": weight + 1}})
    first = checkpoint.snapshot(saved, optimizer, pinned)
    assert asked == [True, True] and len(waits) == 1
    weight += 10
    second = checkpoint.snapshot(saved, optimizer, pinned)
    assert asked == [True, True] and len(waits) == 2
    assert second.tensors["parameter/weight"].data_ptr() == first.tensors["parameter/weight"].data_ptr()
    assert second.tensors["parameter/weight"].tolist() == [10, 11, 12, 13]
    assert second.tensors["exp_avg/weight"].tolist() == [1, 2, 3, 4] and second.parameters["weight"]["numbers"]
