"""Mistakes that the checks have to notice: each is called before the last step, and may return other micro-batches."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rm.data.batch import StepBatches
from rm.model.attention import SplitAttention
from rm.model.heads import Model


def _in_forward(mistake: Callable[[Tensor], object]) -> Callable:
    """A fault that calls `mistake(loss)` at the end of each forward."""

    def apply(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
        def hook(module, args, sums) -> None:
            mistake(sums["loss"].detach().expand(3))

        model.register_forward_hook(hook)
        return batches

    return apply


def state_on_cpu(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    state = optimizer.state[model.norm.weight]
    state["step"] = state["step"].cpu()
    return batches


def split_attention(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    model.kernel = SplitAttention
    return batches


def graph_break(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    class Eager(model.kernel):
        __call__ = torch.compiler.disable(model.kernel.__call__)

    model.kernel = Eager
    return batches


def twice(model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches) -> StepBatches:
    """Everything is computed twice."""
    return replace(batches, micro_batches=2 * batches.micro_batches)


item = _in_forward(lambda x: x[0].item())
copy_to_cpu = _in_forward(lambda x: x.cpu())
copy_to_device = _in_forward(lambda x: x.new_tensor([1.0, 2.0]))
nonzero = _in_forward(lambda x: x.nonzero())
mask = _in_forward(lambda x: x[x > 0])
cpu_indices = _in_forward(lambda x: x[torch.tensor([0, 2])])
synchronize = _in_forward(lambda x: torch.cuda.synchronize())
mixed_devices = _in_forward(lambda x: x + torch.ones(3))
