"""rm.distributed.sharding: precision, recomputation and compilation do not change what is computed; slices are a
rank's own.
"""

import functools

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from rm.data import batch
from rm.distributed import sharding
from rm.model.heads import RewardModel
from tests import made
from tests.ranks import run_ranks


def gradients(**settings):
    """Loss, gradients, and how many values the forward kept for the backward (parameters aside)."""
    with torch.device("meta"):
        model = RewardModel(made.LLAMA, made.SplitAttention)
    sharding.apply(model, sharding.ParallelSettings(**settings))
    for p, q in zip(model.parameters(), made.model(RewardModel).parameters(), strict=True):
        sharding.fill(p, q.detach())
    row = batch.pack(made.pair_examples(made.token_pairs(4)), range(4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = model(row)["loss"]
    loss.backward()
    names = {name for name, _ in model.named_parameters()}
    return loss.item(), [sharding.full_tensor(p.grad) for p in model.parameters()], sum(kept), names


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_keeps_less_and_changes_neither_loss_nor_gradients_nor_names(how):
    loss, grads, kept, names = run_ranks(1, gradients)[0]
    other, others, other_kept, other_names = run_ranks(1, lambda: gradients(gradient_checkpointing=how))[0]
    assert other == loss and other_names == names
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert other_kept < kept / 2  # the hooks see what is outside a checkpoint


def products(how: str) -> int:
    """Matrix products that a forward and backward of `how` run."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            Count.products += op.name() == "aten::mm"
            return op(*args, **(kwargs or {}))

    with Count():
        gradients(gradient_checkpointing=how)
    return Count.products


def test_selective_repeats_no_matrix_product_and_full_repeats_those_of_the_layers():
    none, selective, full = (run_ranks(1, products, how)[0] for how in ("none", "selective", "full"))
    assert selective == none
    assert full - none >= 6 * made.LLAMA.n_layers  # the seventh need not run: the backward starts before it


@pytest.mark.parametrize("how", ["none", "full"])
def test_compiled_layers_compute_the_same(monkeypatch, how):
    graphs = []
    compile = torch.compile

    def quickly(forward, **kwargs):  # traced and differentiated as ever; only inductor's minutes of C++ are left out
        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        return compile(forward, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", quickly)
    loss, grads, *_ = run_ranks(1, gradients)[0]
    settings = {"torch_compile": True, "gradient_checkpointing": how}
    (other, others, *_), compiled = run_ranks(1, lambda: (gradients(**settings), len(graphs)))[0]
    assert compiled >= 2  # what comes before a layer's attention, and what comes after it
    assert other == pytest.approx(loss, rel=1e-6)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_compiled_layer_keeps_is_not_chosen_operation_by_operation():
    with pytest.raises(ValueError, match="--torch_compile true goes with --gradient_checkpointing none or full"):
        sharding.ParallelSettings(torch_compile=True, gradient_checkpointing="selective").check()


def filled(rows: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = torch.nn.Linear(3, rows, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    sharding.fill(layer.weight, torch.arange(3.0 * rows).view(rows, 3))
    return layer.weight.full_tensor().flatten().tolist(), sharding.local_slices(layer.weight)


@pytest.mark.parametrize(("world", "rows"), [(2, 5), (4, 1), (4, 6)])
def test_fill_sets_every_ranks_own_rows_and_only_those(world, rows):
    results = run_ranks(world, filled, rows)
    assert all(values == list(range(3 * rows)) for values, _ in results)
    assert sum(max(0, s[0].stop - s[0].start) for _, s in results) == rows


def held(group: int):
    with torch.device("meta"):
        model = RewardModel(made.LLAMA, made.SplitAttention)
    sharding.apply(model, sharding.ParallelSettings(shard_group_size=group))
    return sum(p.to_local().numel() for p in model.parameters()), model.norm.weight.device_mesh.mesh.tolist()


def kinds(dtype: str, train: bool) -> set:
    """(is a parameter sharded, its dtype) of a model arranged so."""
    with torch.device("meta"):
        model = RewardModel(made.LLAMA, made.SplitAttention)
    sharding.parallelize(model, sharding.ParallelSettings(dtype=dtype), train)
    return {(sharding.local(p) is not p, p.dtype) for name, p in model.named_parameters() if name != "score.weight"}


@pytest.mark.parametrize(
    ("world", "dtype", "train", "kind"),
    [
        (1, "float32", True, (False, torch.float32)),
        (1, "bfloat16", True, (True, torch.float32)),
        (1, "bfloat16", False, (False, torch.bfloat16)),
        (2, "float32", True, (True, torch.float32)),
        (2, "bfloat16", False, (True, torch.float32)),
    ],
)
def test_one_process_is_sharded_only_for_its_masters(world, dtype, train, kind):
    assert run_ranks(world, kinds, dtype, train)[0] == {kind}


def test_a_group_of_two_holds_the_model_between_its_two_and_the_next_group_holds_it_again():
    results = run_ranks(4, held, 2)
    whole = sum(p.numel() for p in made.model(RewardModel).parameters())
    assert all(mesh == [[0, 1], [2, 3]] for _, mesh in results)
    assert sum(n for n, _ in results[:2]) == sum(n for n, _ in results[2:]) == whole


def test_groups_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(RuntimeError, match="--shard_group_size 3 does not divide the 4 processes"):
        run_ranks(4, held, 3)


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    choose = functools.partial(sharding.compute_dtype, sharding.ParallelSettings())
    assert choose() == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose() == torch.bfloat16
