"""How much memory a step takes, found by running it with fake tensors.

The code is the real one. Its tensors have shapes and no memory (`FakeTensorMode`) and the other processes do not exist
(`dist.fake_process_group`), so that a CPU finds in seconds what one of 512 devices will hold. torch's memory tracker
accounts for every tensor from creation to release, and for its purpose: `FSDPMemTracker`, or `MemTracker` where nothing
is sharded.

Not accounted for: a device's libraries (CUDA context, NCCL, cuBLAS), workspaces of kernels, and fragmentation.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rm.data.batch import Segment, StepBatches
from rm.distributed import process_group as dist
from rm.distributed.offload import HostCopies
from rm.distributed.sharding import is_sharded, local, set_gradient_sync
from rm.distributed.torch_private import FakeTensorMode, FSDPMemTracker, MemTracker, TorchDispatchMode
from rm.hf.saving import MAX_SHARD_BYTES
from rm.model import lora
from rm.model.attention import SplitAttention, VarlenAttention
from rm.model.capped_attention import BLOCK
from rm.model.nf4 import count_parameters, quantized_layers
from rm.plan.roofline import CountWork, Work


class PlannedSplitAttention(SplitAttention):
    """The memory of `SplitAttention` in a few calls a layer: those of fake tensors take as long as those of a GPU.

    All segments with the same number of replies are computed as one, [P1 P2 ...] [R11 R21 ...] ..., without a mask,
    which would be larger than all of theirs. So the values are wrong; the mask that they share is held beside.
    """

    def __init__(self, segments: list[Segment], device: torch.device):
        groups = itertools.groupby(sorted(segments, key=len), key=len)
        super().__init__([tuple(map(sum, zip(*group, strict=True))) for _, group in groups], device)
        self.planned = SplitAttention(segments, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float = 0.0) -> Tensor:
        out = super().__call__(q, k, v, window, scale, softcap)
        if not self.planned.needs_mask(window):
            return out
        return _Holds.apply(out, self.planned._mask(1, 1, window, q.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float) -> Tensor:
        return self._product(q, k, v, None, scale)


class _Holds(torch.autograd.Function):
    """The identity, which keeps a tensor until its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class PlannedCappedAttention(VarlenAttention):
    """The memory of capped attention: that of the fused kernel, and the logits of a block of queries.

    `roofline.capped_attention` has its time.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float = 0.0) -> Tensor:
        out = super().__call__(q, k, v, window, scale)
        return _HoldsLogits.apply(out, (q.shape[1], min(BLOCK, self.longest_query), self.longest_key))


class _HoldsLogits(torch.autograd.Function):
    """The identity, which holds fp32 tensors of a shape for a moment: three in the forward, four and the mask in the
    backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = shape
        x.new_empty((3, *shape), dtype=torch.float32)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        _held = (
            grad_output.new_empty((4, *ctx.shape), dtype=torch.float32),
            grad_output.new_empty(ctx.shape[1:], dtype=torch.bool),
        )
        return grad_output, None


@dataclass(frozen=True)
class Footprint:
    """Bytes of rank 0."""

    weights: int  # its shards
    gradients: int  # of its shards, at the peak
    optimizer: int  # Adam's two moments of the parameters that train
    activations: int  # of forward and backward, with the loss; in bfloat16 also gradients that wait to be reduced
    gathered: int  # full parameters and gradients of the layers being computed, and communication buffers
    end: int  # at the end of the run, when the model is exported and scored without the optimizer
    host: int  # host memory: the snapshot of a checkpoint, and at the end a file of weights or their float32 shards
    gather_traffic: int  # sent and received in a step within a shard group: parameters
    reduce_traffic: int  # the same: gradients
    replica_traffic: int  # sent and received in a step between shard groups: gradients

    @property
    def peak(self) -> int:
        """The most that is held at a time, in a step or at the end."""
        step = self.weights + self.gradients + self.optimizer + self.activations + self.gathered
        return max(step, self.end)

    @property
    def group_traffic(self) -> int:
        """Sent and received in a step within a shard group."""
        return self.gather_traffic + self.reduce_traffic


def of_step(model: nn.Module, batches: StepBatches, **options) -> Footprint:
    """The footprint of a step; `options` as for `simulate`."""
    return simulate(model, batches, **options)[0]


def simulate(
    model: nn.Module,
    batches: StepBatches,
    *,
    all_moments: bool = False,
    state_dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> tuple[Footprint, Work]:
    """The footprint of a step, and the work of its micro-batches.

    Clipping and AdamW's fused update take hardly any memory, and the size of Adam's moments is known: what is run are
    forward and backward of the micro-batches, each next to the gradients of those before.

    Args:
        model: of `rm.model.heads`, sharded, on the meta device.
        all_moments: count Adam's moments of layers that are frozen now, too, as `--lisa_state keep` keeps them.
        state_dtype: what Adam's moments are kept in.
        offload: of a sharded model, count shards, gradients and moments as host memory (`--cpu_offload`).
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=dist.device())
        if model.offloader is not None:
            model.offloader.copies = _PlannedHostCopies(dist.device())
        if is_sharded(model):
            tracker = _OffloadedMemTracker(model) if offload else FSDPMemTracker(model)
        else:
            tracker = _PlainMemTracker()
            tracker.track_external(model)
        with tracker, CountWork() as counter, _Traffic() as traffic:
            last = len(batches.micro_batches)
            for n, batch in enumerate(batches.micro_batches, start=1):
                set_gradient_sync(model, n == last)  # as `train_step` does
                tracker.reset_mod_stats()  # or the tracker refuses a second forward
                (model(batch)["loss"] / model.count(batches)).backward()
        peaks = tracker.get_tracker_snapshot("peak")
    sizes = Counter()
    for kind, size in peaks[dist.device()].items():
        sizes[_KIND_OF.get(getattr(kind, "name", None))] += size
    layers = set(model.layers.parameters()) if all_moments else set()
    trained = {p for p in model.parameters() if p.requires_grad or p in layers}
    footprint = Footprint(
        weights=sizes["weights"],
        gradients=sizes["gradients"],
        optimizer=2 * state_dtype.itemsize * sum(local(p).numel() for p in trained),
        activations=sizes["activations"],
        gathered=sizes["gathered"],
        end=_end(model, sizes["weights"]),
        host=_host(model, trained, state_dtype, peaks.get(_HOST, {}).get("Total", 0)),
        gather_traffic=traffic.gathered,
        reduce_traffic=traffic.reduced,
        replica_traffic=traffic.replicated,
    )
    if offload and is_sharded(model):
        footprint = _offloaded(footprint, model)
    return footprint, counter.work


def _offloaded(footprint: Footprint, model: nn.Module) -> Footprint:
    """With shards, gradients and moments in host memory: on the device are the shards of the layer that is being
    gathered, and of the next, or gradients of as many that have been reduced.
    """
    shards = sum(local(p).nbytes for p in model.parameters())
    gradients = sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
    layers = [sum(local(p).nbytes for p in layer.parameters()) for layer in model.layers]
    copies = 2 * max(*layers, shards - sum(layers))
    return replace(
        footprint,
        weights=footprint.weights - shards,
        gradients=0,
        optimizer=0,
        gathered=footprint.gathered + copies,
        end=footprint.end - shards + copies,
        host=footprint.host + shards + gradients + footprint.optimizer,
    )


def _end(model: nn.Module, weights: int) -> int:
    """Bytes on the device at the end of a run.

    `build.save` gathers one parameter at a time, whose shards are put together in a copy. A reward model's probe texts
    are then scored in float32 without the trained model: at a time, with the embedding, one layer and the next. Of a
    base in 4 bits, the original is exported, and some texts are computed with it in the same way.
    """
    in_4bit = [x.in_features * x.out_features for x in quantized_layers(model).values()]
    largest, itemsize = max([*in_4bit, *(p.numel() for p in model.parameters())]), model.compute_dtype.itemsize
    exported = (0 if in_4bit else weights) + 2 * largest * itemsize
    layers = count_parameters(model.layers)
    not_saved = [p for name, p in model.named_parameters() if name.partition(".")[0] in model.training_modules]
    rest = count_parameters(model) - layers - sum(p.numel() for p in not_saved)
    scored = rest + 2 * layers // len(model.layers)
    if model.head == "lm":
        return max(exported, itemsize * scored if in_4bit else 0)
    return max(exported, 4 * scored)


def _host(model: nn.Module, trained: set[nn.Parameter], state_dtype: torch.dtype, activations: int) -> int:
    """Bytes of host memory, with activations in a step or with the files at the end."""
    snapshot = 0
    for p in lora.checkpointed(model).values():
        moments = 2 * [state_dtype.itemsize] if p in trained else []
        for itemsize in (p.itemsize, *moments):
            snapshot += _pinned(local(p).numel() * itemsize)
    size = count_parameters(model) * model.compute_dtype.itemsize
    exported = min(MAX_SHARD_BYTES, size)
    if quantized_layers(model):
        exported += size // dist.world_size()  # the original base
    scored = 0 if model.head == "lm" else 4 * count_parameters(model) // dist.world_size()
    return snapshot + max(exported, scored, activations)


def _pinned(size: int) -> int:
    """Bytes that are allocated for so many: pinned memory is allocated in powers of two."""
    return 1 << (max(1, size) - 1).bit_length()


_KIND_OF = {
    "SHARDED_PARAM": "weights",
    "PARAM": "weights",
    "BUFFER": "weights",
    "SHARDED_GRAD": "gradients",
    "GRAD": "gradients",
    "ACT": "activations",
    "TEMP": "activations",
    "INP": "activations",
    "UNSHARDED_PARAM": "gathered",
    "UNSHARDED_GRAD": "gathered",
    "ALL_GATHER": "gathered",
    "REDUCE_SCATTER": "gathered",
}


_HOST = torch.device("meta")


class _PlannedHostCopies(HostCopies):
    """Has copies in host memory on a device of their own, since the fake tensors of a plan are all on the CPU."""

    def to_host(self, x: Tensor) -> Tensor:
        buffer = torch.empty(_pinned(x.nbytes) // x.itemsize, dtype=x.dtype, device=_HOST)
        return buffer[: x.numel()].view(x.shape)

    def to_device(self, host: Tensor) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=self.device)


class _OffloadedMemTracker(FSDPMemTracker):
    """Looks for the peak of what is on the device where shards and their gradients are in host memory."""

    def _update_peak_stats(self, peak_state) -> None:
        elsewhere = {}
        for device, sizes in self._curr_mem_snap.items():
            kinds = [kind for kind in sizes if getattr(kind, "name", "") in ("SHARDED_PARAM", "SHARDED_GRAD")]
            elsewhere[device] = sum(sizes[kind] for kind in kinds)
            sizes["Total"] -= elsewhere[device]
        super()._update_peak_stats(peak_state)
        for device, sizes in self._curr_mem_snap.items():
            sizes["Total"] += elsewhere[device]


class _PlainMemTracker(MemTracker):
    """torch's own sets a hook on every parameter, and a frozen one refuses it (torch 2.13)."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        if install_grad_hooks:
            module = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    def _update_peak_stats(self, peak_state) -> None:
        """Only of the whole model: the peaks of every module, which torch keeps too, take longer than all else."""
        of_modules, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = of_modules


class _Traffic(TorchDispatchMode):
    """Counts the bytes of collectives."""

    gathered = reduced = replicated = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        c10d = torch.ops.c10d
        if op is c10d._allgather_base_.default:
            self.gathered += args[0].nbytes - args[1].nbytes  # all but this rank's own part
        elif op is c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes - args[0].nbytes
        elif op is c10d.allreduce_.default:
            self.replicated += 2 * sum(x.nbytes for x in args[0])  # a ring all-reduce sends nearly everything twice
        return op(*args, **(kwargs or {}))
