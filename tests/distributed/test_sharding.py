"""rm.distributed.sharding: precision, recomputation and compilation do not change what is computed; each rank fills its
own shards.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from rm.data import batch
from rm.distributed import sharding
from rm.distributed.sharding import MemorySettings, ParallelSettings
from rm.model.heads import RewardModel
from rm.model.transformer import ModelConfig
from tests import made
from tests.ranks import run_ranks
from tests.training_runs import sharded


def gradients(recompute: str = "none", config: ModelConfig = made.LLAMA, **settings):
    """Loss, gradients, the number of values that the forward saved for the backward, and the parameters' names."""
    model = sharded(made.model(RewardModel, config), ParallelSettings(**settings), recompute)
    micro_batch = batch.pack(made.pair_examples(made.token_pairs(4)), range(4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        loss = model(micro_batch)["loss"]
    loss.backward()
    names = {name for name, _ in model.named_parameters()}
    return loss.item(), [sharding.full_tensor(p.grad) for p in model.parameters()], sum(saved), names


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_saves_less_and_keeps_loss_gradients_and_names(recompute):
    loss, grads, saved, names = run_ranks(1, gradients)[0]
    other_loss, other_grads, other_saved, other_names = run_ranks(1, gradients, recompute)[0]
    assert other_loss == loss and other_names == names
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert other_saved < saved / 2  # the hooks see what is outside a checkpoint


def products(recompute: str) -> int:
    """The number of matrix products that a forward and backward run."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            Count.products += op.name() == "aten::mm"
            return op(*args, **(kwargs or {}))

    with Count():
        gradients(recompute)
    return Count.products


def test_selective_repeats_no_matrix_product_and_full_those_of_the_layers():
    none, selective, full = (run_ranks(1, products, how)[0] for how in ("none", "selective", "full"))
    assert selective == none
    assert full - none >= 6 * made.LLAMA.n_layers  # the seventh need not run: the backward starts before it


TWO_LAYERS = replace(made.LLAMA, n_layers=2, ropes=made.LLAMA.ropes[:2], windows=(0, 0))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_layers_compute_the_same(monkeypatch, recompute):
    graphs = []
    compile = torch.compile

    def compile_without_inductor(
        forward, **kwargs
    ):  # traced and differentiated, but without minutes of C++ compilation
        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        return compile(forward, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    loss, grads, *_ = run_ranks(1, gradients, "none", TWO_LAYERS)[0]

    def compiled():
        return gradients(recompute, TWO_LAYERS, torch_compile=True), len(graphs)

    (other_loss, other_grads, *_), compiled_graphs = run_ranks(1, compiled, timeout=240)[0]
    assert compiled_graphs >= 2  # what precedes a layer's attention, and what follows it
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compilation_and_selective_recomputation_exclude_each_other():
    with pytest.raises(ValueError, match="--torch_compile true works with --gradient_checkpointing none or full"):
        sharding.check_memory(ParallelSettings(torch_compile=True), MemorySettings(gradient_checkpointing="selective"))


def test_offloading_is_refused_where_nothing_is_on_a_gpu():
    with pytest.raises(ValueError, match="--cpu_offload true keeps in host memory what would be on a GPU"):
        sharding.check_offload(MemorySettings(cpu_offload=True))


def filled(n: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = torch.nn.Linear(3, n, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    sharding.fill(layer.weight, torch.arange(3.0 * n).view(n, 3))
    return layer.weight.full_tensor().flatten().tolist(), sharding.local_slices(layer.weight)


@pytest.mark.parametrize(("world_size", "n"), [(2, 5), (4, 1), (4, 6)])
def test_fill_sets_the_shard_of_every_rank_and_nothing_else(world_size, n):
    results = run_ranks(world_size, filled, n)
    assert all(values == list(range(3 * n)) for values, _ in results)
    assert sum(max(0, s[0].stop - s[0].start) for _, s in results) == n


def parallelized(settings: ParallelSettings, train: bool = True) -> RewardModel:
    """A model on the meta device."""
    with torch.device("meta"):
        model = RewardModel(made.LLAMA, made.SplitAttention)
    sharding.parallelize(model, settings, train=train)
    return model


def local_values(group_size: int):
    model = parallelized(ParallelSettings(shard_group_size=group_size))
    return sum(p.to_local().numel() for p in model.parameters()), model.norm.weight.device_mesh.mesh.tolist()


def shards_and_dtypes(dtype: str, train: bool) -> set:
    """(is a parameter sharded, its dtype) of the parameters outside the score head."""
    model = parallelized(ParallelSettings(dtype=dtype), train)
    return {(sharding.local(p) is not p, p.dtype) for name, p in model.named_parameters() if name != "score.weight"}


@pytest.mark.parametrize(
    ("world_size", "dtype", "train", "expected"),
    [
        (1, "float32", True, (False, torch.float32)),
        (1, "bfloat16", True, (True, torch.float32)),
        (1, "bfloat16", False, (False, torch.bfloat16)),
        (2, "float32", True, (True, torch.float32)),
        (2, "bfloat16", False, (True, torch.bfloat16)),
    ],
)
def test_one_process_is_sharded_only_for_its_master_weights(world_size, dtype, train, expected):
    assert run_ranks(world_size, shards_and_dtypes, dtype, train)[0] == {expected}


def test_each_shard_group_of_two_holds_the_whole_model():
    results = run_ranks(4, local_values, 2)
    total = sum(p.numel() for p in made.model(RewardModel).parameters())
    assert all(mesh == [[0, 1], [2, 3]] for _, mesh in results)
    assert sum(n for n, _ in results[:2]) == sum(n for n, _ in results[2:]) == total


def test_shard_groups_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(RuntimeError, match="--shard_group_size 3 does not divide the 4 processes"):
        run_ranks(4, local_values, 3)


@pytest.mark.parametrize(
    ("available", "native", "expected"),
    [(False, False, torch.float32), (True, False, torch.float32), (True, True, torch.bfloat16)],
)
def test_auto_is_bfloat16_only_on_a_gpu_that_computes_in_it(available, native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    # A T4 emulates it: torch says yes unless it is asked not to count that.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert sharding.compute_dtype("auto") == expected
