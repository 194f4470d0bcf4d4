"""Seconds of a step in bfloat16 on a GPU, on paper: an operation takes what its arithmetic or memory traffic needs.

The operations are those of the simulated step (`rm.plan.memory`), as a CPU issues them: a few of them are fused on a
GPU. The shares below are assumed. docs/scale.md has what follows from them beside what one H200 reached.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from rm.data.batch import Segment
from rm.distributed.torch_private import TorchDispatchMode
from rm.model import capped_attention as capped
from rm.model.transformer import ModelConfig
from rm.training.flops import PEAKS

PRODUCTS = 0.66  # of the peak, which matrix products reach
ATTENTION = 0.3  # of the peak, which attention over short texts reaches
BANDWIDTH = 0.8  # of the memory's, and of the links'
KERNEL = 2.5e-6  # seconds that the smallest kernel takes
LAUNCH = 9e-6  # seconds that the host takes to issue one from Python
OPTIMIZER_BYTES = 36  # read and written per parameter: clipping reads the gradient, AdamW reads 4 and writes 3 numbers


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets, in bytes per second."""

    memory: float
    link: float  # to the other GPUs of its machine, one direction


GPUS = {
    "H200": Gpu(4.8e12, 450e9),
    "H100": Gpu(3.35e12, 450e9),
    "A100": Gpu(2.0e12, 300e9),
    "RTX 4090": Gpu(1.008e12, 32e9),
    "A10": Gpu(0.6e12, 32e9),
    "L4": Gpu(0.3e12, 32e9),
}


@dataclass(frozen=True)
class Work:
    """Of some micro-batches of one process, without collectives."""

    kernels: dict[tuple[int, int], int] = field(default_factory=dict)  # (operations, bytes) -> how many such kernels

    def seconds(self, gpu: str) -> float:
        """That the device is busy, without attention's arithmetic."""
        flops, memory = PRODUCTS * PEAKS[gpu] * 1e12, BANDWIDTH * GPUS[gpu].memory
        return sum(max(f / flops, b / memory, KERNEL) * count for (f, b), count in self.kernels.items())

    @property
    def count(self) -> int:
        return sum(self.kernels.values())

    def __add__(self, other: "Work") -> "Work":
        return Work(dict(Counter(self.kernels) + Counter(other.kernels)))


class CountWork(TorchDispatchMode):
    """Records what the operations compute, read and write."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace in ("aten", "torch_attn") and not op.is_view and not op.name().startswith(_NO_KERNEL):
            inputs = [x for x in _flat(args) if isinstance(x, torch.Tensor)]
            outputs = [x for x in _flat((out,)) if isinstance(x, torch.Tensor)]
            # Broadcast dimensions are read once.
            moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*inputs, *outputs))
            key = (_product_flops(op, inputs), moved)
            self.work.kernels[key] = self.work.kernels.get(key, 0) + 1
        return out


_NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift", "aten::set_")


def _flat(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _product_flops(op, inputs: list[torch.Tensor]) -> int:
    if op.name().split(".")[0] not in ("aten::mm", "aten::addmm", "aten::bmm"):
        return 0
    left, right = [x for x in inputs if x.ndim > 1][-2:]
    return 2 * left.numel() * right.shape[-1]


def capped_attention(config: ModelConfig, segments: list[Segment], dtype: torch.dtype, recompute: bool) -> Work:
    """What capped attention computes, reads and writes in all layers, forward and backward, for a micro-batch.

    No kernel fuses it (`rm.model.capped_attention`). One block of queries is run on the meta device, of the mean size:
    the number of blocks and that of their logits are exact.

    Args:
        segments: of the micro-batch.
        recompute: whether the backward computes layers again.
    """
    texts = [(prefix + first, prefix + first) for prefix, first, *_ in segments]
    texts += [(reply, prefix + reply) for prefix, _, *others in segments for reply in others]
    kernels = Counter()
    for window, layers in Counter(config.windows).items():
        sizes = [(q.stop - q.start, k.stop - k.start) for text in texts for q, k in capped.blocks(*text, window)]
        queries = max(1, round(sum(n for n, _ in sizes) / len(sizes)))
        keys = max(queries, round(sum(n * m for n, m in sizes) / len(sizes) / queries))
        q, k, v = (
            torch.empty(n, heads, config.head_dim, dtype=dtype, device="meta", requires_grad=True)
            for n, heads in ((queries, config.n_heads), (keys, config.n_kv_heads), (keys, config.n_kv_heads))
        )
        with CountWork() as counter:
            for _ in range(2 if recompute else 1):
                out = capped.capped_attention(q, k, v, window, config.attn_scale, config.attn_softcap)
            out.backward(torch.empty_like(out))
        for kernel, count in counter.work.kernels.items():
            kernels[kernel] += count * layers * len(sizes)
    return Work(dict(kernels))


@dataclass(frozen=True)
class Step:
    """Seconds of a mean step of one process."""

    device: float
    host: float
    communication: float

    @property
    def total(self) -> float:
        """Issuing kernels and communicating overlap with computing them."""
        return max(self.device, self.host, self.communication)

    @property
    def limit(self) -> str:
        limits = {"the device": self.device, "launches": self.host, "communication": self.communication}
        return max(limits, key=limits.get)


def step(gpu: str, work: Work, scale: float, launches: float, attention: float, trained: int, traffic: float) -> Step:
    """A mean step on a GPU.

    Args:
        work: of some micro-batches; a mean step has `scale` times their tokens, and `launches` kernels.
        attention: operations of attention in a mean step, where a kernel fuses them.
        trained: parameters of this process that the optimizer updates.
        traffic: bytes that this process sends and receives within its machine in a step.
    """
    optimizer = OPTIMIZER_BYTES * trained / (BANDWIDTH * GPUS[gpu].memory)
    device = scale * work.seconds(gpu) + attention / (ATTENTION * PEAKS[gpu] * 1e12) + optimizer
    return Step(device, launches * LAUNCH, traffic / (BANDWIDTH * GPUS[gpu].link))
