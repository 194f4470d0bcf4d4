"""How much memory a step takes, found by running it on paper.

The code is the real one. The tensors have shapes and no memory (`FakeTensorMode`) and the other processes do not exist
(`dist.on_paper`), so that a CPU finds in seconds what one of 512 devices will hold. `FSDPMemTracker` of torch keeps the
books: every tensor from its making to its end, and what it is for (`MemTracker` where nothing is sharded).

Not in the books: what a device's libraries take (CUDA context, NCCL, cuBLAS), what kernels use inside, and fragments.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from rm.data.batch import StepBatches
from rm.distributed import process_group as dist
from rm.distributed.sharding import local


@dataclass(frozen=True)
class Footprint:
    """Bytes of rank 0."""

    weights: int  # its shards
    gradients: int  # those at hand at the peak
    optimizer: int  # Adam's two moments of what trains
    activations: int  # of forward and backward, with the loss
    gathered: int  # whole parameters and gradients of the layers at work, and the buffers they travel in
    gather_traffic: int  # received and sent in a step within a shard group: parameters, gradients
    replica_traffic: int  # and between shard groups: gradients

    @property
    def peak(self) -> int:
        """The most that is held at a time."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def of_step(model: nn.Module, work: StepBatches, all_moments: bool = False) -> Footprint:
    """The footprint of a step with this work.

    Clipping and AdamW's fused update take next to no memory of their own, and Adam's moments are known: so what is run
    are forward and backward of the rows, beside the gradients of those before.

    Args:
        model: of `rm.hf.build`, sharded, on the meta device.
        all_moments: count Adam's moments of layers that are frozen now too, as `--lisa_state keep` leaves them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=dist.device())
        if isinstance(model, FSDPModule):
            books = FSDPMemTracker(model)
        else:
            books = MemTracker()
            books.track_external(model)
        with books, _Traffic() as traffic:
            for row in work.rows:
                books.reset_mod_stats()  # or it takes a second forward for a mistake
                (model(row)["loss"] / model.count(work)).backward()
        (peak,) = books.get_tracker_snapshot("peak").values()
    held = Counter()
    for kind, count in peak.items():
        held[_HEADINGS.get(getattr(kind, "name", None))] += count
    layers = set(model.layers.parameters()) if all_moments else set()
    trained = sum(local(p).nbytes for p in model.parameters() if p.requires_grad or p in layers)
    return Footprint(
        weights=held["weights"],
        gradients=held["gradients"],
        optimizer=2 * trained,
        activations=held["activations"],
        gathered=held["gathered"],
        gather_traffic=traffic.gathered,
        replica_traffic=traffic.replicated,
    )


_HEADINGS = {
    "SHARDED_PARAM": "weights",
    "PARAM": "weights",
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


class _Traffic(TorchDispatchMode):
    """Counts bytes that travel."""

    gathered = replicated = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        c10d = torch.ops.c10d
        if op in (c10d._allgather_base_.default, c10d._reduce_scatter_base_.default):
            self.gathered += abs(args[0].nbytes - args[1].nbytes)  # all but a rank's own part
        elif op is c10d.allreduce_.default:
            self.replicated += 2 * sum(x.nbytes for x in args[0])  # a ring sends everything not quite twice
        return op(*args, **(kwargs or {}))
