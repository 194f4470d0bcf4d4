"""How a model is spread over devices: compile, recompute, shard, in that order, from outside the model.

FSDP2 (`fully_shard`) is applied wherever there is something to gather or to cast: on several processes, and on one that
trains in bfloat16 with float32 masters. One process that trains in float32, or only scores, holds the model as it is:
every layer would be copied for nothing. Parameters are made on the meta device and get memory only when each rank holds
its shard.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rm.config import require_positive, setting
from rm.distributed import process_group as dist


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Precision and memory"""

    dtype: str = setting(
        "auto",
        "what the model computes in; master weights, score head, loss and reductions are always float32; "
        "auto: bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
        may_change=True,
    )
    gradient_checkpointing: str = setting(
        "none",
        "what the backward recomputes to save memory; selective: all but matrix products; full: every layer",
        choices=("none", "selective", "full"),
        may_change=True,
    )
    torch_compile: bool = setting(
        False,
        "compile each layer, in a first step of up to a minute: for GPUs; a CPU gains little, and loses in "
        "bfloat16; goes with recomputation none or full",
        may_change=True,
    )
    shard_group_size: int | None = setting(
        None,
        "split the model over groups of this many processes (such as a machine's) that each hold all of it, so that "
        "only gradients cross between groups; none: over all processes",
        may_change=True,
    )

    def check(self) -> None:
        if self.shard_group_size is not None:
            require_positive(self, "shard_group_size")
        if self.torch_compile and self.gradient_checkpointing == "selective":
            raise ValueError(
                "--torch_compile true goes with --gradient_checkpointing none or full, not with selective: a compiled "
                "layer has no single operations whose results could be kept"
            )


def compute_dtype(settings: ParallelSettings) -> torch.dtype:
    """What `--dtype` means on this device."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def apply(model: nn.Module, settings: ParallelSettings) -> None:
    """Compile, recompute and shard a meta-built model, and give every rank's shard memory, without values."""
    parallelize(model, settings)
    model.to_empty(device=dist.device())


def parallelize(model: nn.Module, settings: ParallelSettings, train: bool = True) -> None:
    """Compile, recompute and shard a meta-built model, which stays on the meta device.

    Args:
        train: False for a model that only scores: it needs no float32 masters.
    """
    for layer in model.layers:
        if settings.torch_compile:
            # Below what recomputes: attention breaks the graph, and a checkpoint with a break in it is never compiled.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if settings.gradient_checkpointing != "none":
            layer.forward = functools.partial(_CHECKPOINTED[settings.gradient_checkpointing], layer.forward)
    dtype, mesh = compute_dtype(settings), _mesh(settings.shard_group_size or dist.world_size())
    if mesh.size() > 1 or (train and dtype != torch.float32):
        _shard(model, mesh, dtype)
    else:
        _to_compute(model, dtype)


def place(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a meta-built model memory on this device, whole, in the dtype it computes in."""
    _to_compute(model, dtype)
    model.to_empty(device=dist.device())


def _to_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """A whole model in the dtype it computes in; a score head is fp32."""
    model.to(dtype)
    if hasattr(model, "score"):
        model.score.float()


def _mesh(group: int) -> DeviceMesh:
    """All ranks in groups of `group` neighbours: (replicas, shards), or one dimension where there is one group."""
    if dist.world_size() % group:
        raise ValueError(f"--shard_group_size {group} does not divide the {dist.world()} processes")
    if group == dist.world_size():
        return init_device_mesh(dist.device().type, (group,))
    return init_device_mesh(
        dist.device().type, (dist.world_size() // group, group), mesh_dim_names=("replica", "shard")
    )


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if hasattr(model, "score"):  # a unit of its own: it computes in fp32 whatever the rest does
        fully_shard(model.score, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # embedding, last norm and LM head: tied weights stay in one unit
    if hasattr(model, "score"):
        register_fsdp_forward_method(model, "rewards")


# What a backward would pay for most if it recomputed it. The rest is cheap: norms, rotations, activations.
_KEPT = ("mm", "addmm", "_scaled_dot_product", "_varlen_attn", "_flash_attention", "_efficient_attention")


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    name = op.name().partition("::")[2].partition(".")[0]
    kept = name.startswith(_KEPT) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_CHECKPOINTED = {
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products),
    ),
}


def requires_grad_changed(model: nn.Module) -> None:
    """To be called after `requires_grad_` on parameters of a sharded model.

    FSDP2 settles the dtype in which a unit's gradients are reduced at its first forward. A unit that was frozen then
    has none, and fails when it is to train later (torch 2.13, pytorch#186998).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                group._init_mp_dtypes()


def _groups(unit: FSDPModule) -> list:
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.13; one group a unit before
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def local(tensor: Tensor) -> Tensor:
    """This rank's own part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a parameter lies in the whole of it."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))


def full_tensor(parameter: Tensor) -> Tensor:
    """All of a parameter's values, on every rank. Every rank must ask."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, from its whole values, which every rank has."""
    local(parameter).copy_(values[local_slices(parameter)])
