"""Collectives and bytes of a step whose gradients are reduced in each micro-batch, or once: --sync_each_batch.

    python -m tests.benchmarks.sync_each_batch

Counts, on gloo: no times.
"""

from collections import Counter

import torch

from rm.config import compose
from rm.data.batch import Loader
from rm.distributed.torch_private import TorchDispatchMode
from rm.model.heads import RewardModel
from rm.plan.memory import _Traffic
from rm.training import optim
from tests import made
from tests.ranks import run_ranks
from tests.training_runs import ATTENTION_COST, Settings, examples_of, run_step, sharded

STEPS = 3


class Calls(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.calls[op.name()] += 1
        return op(*args, **(kwargs or {}))


def run(dtype: str, sync_each_batch: bool, group: int | None) -> tuple:
    """Of this rank: micro-batches, collectives and bytes within a group in the last step; (loss, norm) of all steps."""
    settings = compose(
        Settings, global_batch_size=16, max_tokens=45, learning_rate=1e-2, dtype=dtype, shard_group_size=group,
        sync_each_batch=sync_each_batch,
    )  # fmt: skip
    model = sharded(made.model(RewardModel), settings.parallel)
    optimizer = optim.adamw(model, settings.optim)
    examples = examples_of(RewardModel, 32)
    loader = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=ATTENTION_COST)
    lines = []
    for step in range(STEPS):
        batches = loader.at(step)
        with Calls() as counter, _Traffic() as traffic:
            lines.append(run_step(model, optimizer, batches))
    return len(batches.micro_batches), dict(counter.calls), traffic.gathered + traffic.reduced, torch.tensor(lines)


def main() -> None:
    for world, group in ((2, None), (4, None), (4, 2)):
        for dtype in ("float32", "bfloat16"):
            (count, calls, size, lines), (_, fewer, less, others) = (
                run_ranks(world, run, dtype, sync, group)[0] for sync in (True, False)
            )
            difference = ((lines - others) / lines).abs().max().item()
            print(f"{world} processes, groups of {group or world}, {dtype}, {count} micro-batches: {calls} -> {fewer}")
            print(f"    {size:,} -> {less:,} bytes, {less / size:.2f}; largest difference of a line {difference:.1e}")


if __name__ == "__main__":
    main()
