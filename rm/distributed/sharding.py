"""How a model is spread over devices: compilation, recomputation and sharding, applied to it from outside.

FSDP2 (`fully_shard`) is applied where there is something to gather or to cast: on several processes, and on one that
trains in bfloat16 with float32 master weights. One process that trains in float32, or only scores, holds the plain
model, since FSDP2 would copy every layer for nothing. Parameters are created on the meta device and get memory only
when each rank knows its shard.

torch.distributed.fsdp and torch.distributed.tensor are imported where they are used: they take a second to import.
"""

import functools
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rm.config import SettingsGroup, require_positive, setting
from rm.distributed import process_group as dist
from rm.distributed.offload import ActivationOffloader, HostCopies


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(SettingsGroup):
    """Precision and sharding"""

    dtype: str = setting(
        "auto",
        "what the model computes in; master weights, score head, loss and reductions are always float32; "
        "auto: bfloat16 on a GPU that supports it, else float32",
        choices=("auto", "float32", "bfloat16"),
        may_change=True,
    )
    torch_compile: bool = setting(
        False,
        "compile each layer, which makes the first step take up to a minute: for GPUs; on a CPU it gains little, and "
        "is slower in bfloat16",
        may_change=True,
    )
    shard_group_size: int | None = setting(
        None,
        "shard the model over groups of this many processes (such as those of one machine), each of which holds all "
        "of it, so that only gradients are exchanged between groups; none: over all processes",
        may_change=True,
    )
    reshard_after_forward: bool = setting(
        True,
        "free the gathered parameters of a layer after its forward, and gather them again for its backward; false: "
        "keep them, which takes the memory of a whole model in --dtype and saves a third of the communication",
        may_change=True,
    )
    sync_each_batch: bool = setting(
        True,
        "reduce gradients within a shard group after each micro-batch; false: once a step, which keeps the gradients "
        "of the whole model in float32 on every process until then",
        may_change=True,
    )

    def check(self) -> None:
        require_positive(shard_group_size=self.shard_group_size)


@dataclass(frozen=True, kw_only=True)
class MemorySettings(SettingsGroup):
    """Memory"""

    gradient_checkpointing: str = setting(
        "none",
        "what the backward recomputes to save memory; selective: all but matrix products; full: every layer",
        choices=("none", "selective", "full"),
        may_change=True,
    )
    cpu_offload: bool = setting(
        False,
        "keep weights, gradients and optimizer states in host memory, where the optimizer steps too, and copy to the "
        "GPU the layers that are being computed",
        may_change=True,
    )
    activation_offloading: bool = setting(
        False,
        "keep what layers save for the backward in host memory until then; copies run beside the computation",
        may_change=True,
    )


def check_memory(parallel: ParallelSettings, memory: MemorySettings) -> None:
    """Raise ValueError where compilation, recomputation and offloading exclude each other."""
    if parallel.torch_compile and memory.gradient_checkpointing == "selective":
        raise ValueError(
            "--torch_compile true works with --gradient_checkpointing none or full, not with selective: a compiled "
            "layer has no single operations whose results could be kept"
        )
    if memory.activation_offloading and memory.gradient_checkpointing == "selective":
        raise ValueError(
            "--activation_offloading true works with --gradient_checkpointing none or full, not with selective, which "
            "keeps the results of matrix products on the device"
        )


def check_offload(memory: MemorySettings) -> None:
    """Raise ValueError where there is nothing that could be kept elsewhere."""
    if memory.cpu_offload and dist.world_size() == 1 and dist.device().type == "cpu":
        raise ValueError(
            "--cpu_offload true keeps in host memory what would be on a GPU, and this run has no GPU: leave it out"
        )


def compute_dtype(dtype: str) -> torch.dtype:
    """What `--dtype` stands for on this device."""
    if dtype != "auto":
        return getattr(torch, dtype)
    # Emulated bfloat16, on GPUs before Ampere, is slower than float32.
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def parallelize(
    model: nn.Module,
    settings: ParallelSettings,
    recompute: str = "none",
    train: bool = True,
    offload: bool = False,
    offload_activations: bool = False,
) -> None:
    """Compile, recompute, offload and shard a model on the meta device, where it stays.

    Args:
        model: has `layers`, a `kernel` (`rm.model.attention`) and `fp32_modules`, the names of its submodules that
            compute in float32 whatever the others do.
        recompute: a value of --gradient_checkpointing.
        train: False for a model that only scores: it needs no float32 master weights.
        offload: keep the shards of a model in host memory, with their gradients, and copy them to the GPU layer by
            layer; while training in pinned memory, which takes longer to allocate and less to copy.
        offload_activations: keep what layers save for the backward in host memory until then.
    """
    if settings.torch_compile:
        from rm.distributed.torch_private import specialize_floats

        specialize_floats()
        if not model.kernel.compiles:
            model.kernel = _eager(model.kernel)
    for layer in model.layers:
        # Compilation is applied below recomputation: attention may break the graph, and a checkpointed function with
        # a graph break in it is not compiled at all.
        if settings.torch_compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if recompute != "none":
            layer.forward = functools.partial(_CHECKPOINTED[recompute], layer.forward)
    # Above recomputation: of a layer that is computed again, the input alone is saved.
    model.offloader = ActivationOffloader(model.layers, HostCopies(dist.device())) if offload_activations else None
    group_size = settings.shard_group_size or dist.world_size()
    if dist.world_size() % group_size:
        raise ValueError(f"--shard_group_size {group_size} does not divide the {dist.world_size()} processes")
    dtype = compute_dtype(settings.dtype)
    has_master_weights = train and dtype != torch.float32
    if not train:
        cast_to_compute(model, dtype)
        offload = offload and dist.device().type == "cuda"  # on a CPU it would only copy
    if dist.world_size() > 1 or has_master_weights or offload:
        pin = train and dist.device().type == "cuda"
        _shard(model, _mesh(group_size), dtype, settings.reshard_after_forward, offload, pin)
        model.sync_each_batch = settings.sync_each_batch


def allocate(model: nn.Module, device: torch.device | None = None) -> None:
    """Give a model on the meta device memory on a device, without values. None: this process's device.

    Raises:
        ValueError: this machine does not have as much memory.
    """
    device = device or dist.device()
    if device.type == "cpu":  # which may promise more than there is, and then end any process
        needed = sum(local(p).numel() * p.dtype.itemsize for p in model.parameters())
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise ValueError(
                f"the model's weights need {needed / 2**30:,.0f} GiB in this process, and this machine has "
                f"{there / 2**30:,.0f} GiB: use more processes or a smaller model"
            )
    if is_sharded(model):
        model.to_empty(device=device)
        for module in model.modules():  # a base in four bits stays on the device, whatever is offloaded
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device=dist.device()))
        return
    # Not to_empty: empty_like of a meta tensor imports sympy, which takes half a second.
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):  # a base in four bits
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _eager(kernel: type) -> type:
    """An attention kernel that torch.compile does not trace."""

    class EagerKernel(kernel):
        __call__ = torch.compiler.disable(kernel.__call__)

    return EagerKernel


def cast_to_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model that does not train to the dtype it computes in, except its `fp32_modules`."""
    model.to(dtype)
    for name in model.fp32_modules:
        model.get_submodule(name).float()


def _mesh(group_size: int) -> DeviceMesh:
    """All ranks in groups of `group_size` neighbours: (replicas, shards), or one dimension where there is one group."""
    world_size, device = dist.world_size(), dist.device().type
    if group_size == world_size:
        return init_device_mesh(device, (group_size,))
    return init_device_mesh(device, (world_size // group_size, group_size), mesh_dim_names=("replica", "shard"))


def _shard(
    model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, reshard_after_forward: bool, offload: bool, pin: bool
) -> None:
    from torch.distributed import fsdp

    precision = fsdp.MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    place = fsdp.CPUOffloadPolicy(pin_memory=pin) if offload else fsdp.OffloadPolicy()
    shard = functools.partial(fsdp.fully_shard, mesh=mesh, offload_policy=place)
    for layer in model.layers:
        shard(layer, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    for name in model.fp32_modules:  # units of their own, without a precision policy: they compute in float32
        shard(model.get_submodule(name))
    # The root unit holds embedding, last norm and LM head, so that tied weights stay in one unit.
    shard(model, mp_policy=precision)
    for name in model.forward_methods:
        fsdp.register_fsdp_forward_method(model, name)


# What a backward would spend most on if it recomputed it. The rest is cheap: norms, rotary positions, activations.
_KEPT = ("mm", "addmm", "_scaled_dot_product", "_varlen_attn", "_flash_attention", "_efficient_attention")


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    name = op.name().partition("::")[2].partition(".")[0]
    is_kept = name.startswith(_KEPT) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_CHECKPOINTED = {
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products),
    ),
}


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 was applied to this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing can be sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's view of a sharded tensor."""
    distributed_tensor = sys.modules.get("torch.distributed.tensor")
    return distributed_tensor is not None and isinstance(tensor, distributed_tensor.DTensor)


def requires_grad_changed(model: nn.Module) -> None:
    """To be called after `requires_grad_` on parameters of a sharded model.

    FSDP2 settles the dtype in which a unit's gradients are reduced at its first forward. A unit that was frozen then
    has none, and fails when it is to train later (torch 2.13, pytorch#186998).
    """
    sharded = [module for module in model.modules() if is_sharded(module)]
    if sharded:
        from rm.distributed.torch_private import reset_mixed_precision_dtypes

        for module in sharded:
            reset_mixed_precision_dtypes(module)


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """To be called before each micro-batch: which processes exchange gradients in its backward.

    With the last one of a step all do. Before it none do with --sync_each_batch false, where each process adds up the
    gradients of whole layers, and otherwise those of a shard group, each of which adds up its shards.
    """
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last or model.sync_each_batch)
        model.set_requires_all_reduce(is_last)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that a forward without backward leaves: those of the root unit, and of the layers
    with --reshard_after_forward false.

    Whoever then changes the shards (to swap in averaged weights, say) can rely on the next forward to gather them.
    """
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def release(model: nn.Module) -> None:
    """Free the memory of a model's parameters, whoever still refers to them. The model cannot be used afterwards."""
    reshard(model)
    for tensor in (*model.parameters(), *model.buffers()):
        local(tensor.detach()).untyped_storage().resize_(0)


def local(tensor: Tensor) -> Tensor:
    """This rank's own part of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """The position of this rank's part of a parameter within the full parameter, one slice for each dimension."""
    if not is_dtensor(parameter):
        return tuple(slice(0, n) for n in parameter.shape)
    from rm.distributed.torch_private import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))


def full_tensor(tensor: Tensor) -> Tensor:
    """All values of a tensor, on every rank, without its graph. Every rank has to call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, from its full values, which every rank has."""
    local(parameter).copy_(values[local_slices(parameter)])


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in settings and files: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
