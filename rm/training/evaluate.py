"""Means of a model's metrics over held-out examples."""

from collections.abc import Callable

import torch
from torch import nn

from rm.data.batch import EvalBatches
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.model.heads import Sums


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: EvalBatches, between_batches: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Means over all examples, exact whatever the number of ranks.

    Args:
        between_batches: called before every micro-batch; may leave by raising.
    """
    model.eval()
    total: Sums = {}
    for batch in batches:
        between_batches()
        add_sums(total, model(batch.to(dist.device())))
    model.train()
    summed = dist.sum_over_ranks(torch.stack([value.double() for value in total.values()]))
    sharding.reshard(model)
    return means(dict(zip(total, summed.tolist(), strict=True)))


def add_sums(total: Sums, sums: Sums) -> None:
    """Add a micro-batch's sums to those of a step, without their graph."""
    for name, value in sums.items():
        total[name] = total[name] + value.detach() if name in total else value.detach()


def means(sums: dict[str, float]) -> dict[str, float]:
    """Divide summed metrics by the global count."""
    return {name: value / sums["count"] for name, value in sums.items() if name != "count"}
