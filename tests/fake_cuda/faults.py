"""Mistakes that the checks have to notice: each is called before the last step, and may return other micro-batches."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from rm.data.batch import StepBatches
from rm.model.attention import SplitAttention
from rm.model.heads import Model

WAITS: tuple[Callable[[Tensor], object], ...] = (  # what a host waits for, on a loss of shape (3,)
    lambda x: x[0].item(),
    lambda x: x.cpu(),
    lambda x: x.new_tensor([1.0, 2.0]),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: x[torch.tensor([0, 2])],
    lambda x: torch.cuda.synchronize(),
)


def waits(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    """The forward makes all mistakes of WAITS."""

    def hook(module, args, sums) -> None:
        for mistake in WAITS:
            with contextlib.suppress(DynamicOutputShapeException):  # fake tensors have no number of non-zeros
                mistake(sums["loss"].detach().expand(3))

    model.register_forward_hook(hook)
    return batches


def mixed_devices(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    model.register_forward_hook(lambda module, args, sums: sums | {"loss": sums["loss"] + torch.ones(3)})
    return batches


def state_on_cpu(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    state = optimizer.state[model.norm.weight]
    state["step"] = state["step"].cpu()
    return batches


def split_attention(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    model.kernel = SplitAttention
    return batches


def all_reduce_always(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    model.set_requires_all_reduce = lambda required: None
    return batches


def graph_break(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    class Eager(model.kernel):
        __call__ = torch.compiler.disable(model.kernel.__call__)

    model.kernel = Eager
    return batches


def twice(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    """Everything is computed twice."""
    return replace(batches, micro_batches=2 * batches.micro_batches)
