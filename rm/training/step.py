"""The mathematics of one optimizer step and of one evaluation. The scripts say when; this says how.

Every row's loss is a sum. It is divided here, once, by the count of the whole global batch, which the plan knows
before the forward. FSDP2 averages gradients over ranks; the visible factor `world` undoes that. So the update is the
same for every split into rows and ranks, up to the order of fp32 additions.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rm.data.batch import EvalBatches, StepBatches
from rm.distributed import process_group as dist
from rm.model.heads import Sums


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, work: StepBatches, max_grad_norm: float) -> Sums:
    """One update. Nothing in it waits for the device.

    Returns:
        this rank's sums over its rows, and `grad_norm`, the global norm before clipping.
    """
    total: Sums = {}
    torch.manual_seed(work.seed)
    for row in work.rows:
        sums = model(row.to(dist.device()))
        (sums["loss"] * (dist.world_size() / model.count(work))).backward()
        _add(total, sums)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total | {"grad_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm}


@torch.no_grad()
def evaluate(model: nn.Module, rows: EvalBatches, between_rows: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Means over all examples, exact whatever the number of ranks. `between_rows` may leave, by raising."""
    model.eval()
    total: Sums = {}
    for row in rows:
        between_rows()
        _add(total, model(row.to(dist.device())))
    model.train()
    summed = dist.sum_over_ranks(torch.stack([x.double() for x in total.values()]))
    return means(dict(zip(total, summed.tolist(), strict=True)))


def means(sums: dict[str, float]) -> dict[str, float]:
    """The one division."""
    return {name: value / sums["count"] for name, value in sums.items() if name != "count"}


def _add(total: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        total[name] = total[name] + value.detach() if name in total else value.detach()


def parameters_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
