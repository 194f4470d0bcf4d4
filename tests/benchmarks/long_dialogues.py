"""Memory of a step by the length of a dialogue, measured on a CPU and planned: what grows is linear in its tokens.

    python -m tests.benchmarks.long_dialogues --out docs/benchmarks/long_dialogues.md

A micro-batch is one text, or one pair that shares three quarters of it. The model is small (two layers of width 64,
a vocabulary of 32,000), in float32 with full recomputation, so that a matrix of length by length, in however few bytes,
would be most of the memory. Each step runs in a process of its own.
"""

import argparse
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from rm.data.batch import StepBatches, pack
from rm.data.examples import Example, Examples
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.model.heads import LanguageModel, RewardModel
from rm.model.transformer import Rope
from rm.plan import memory
from rm.plan.memory import PlannedCappedAttention, PlannedSplitAttention
from rm.training import optim
from rm.training.optim import OptimSettings
from tests import made
from tests.benchmarks.common import MIB, Page, table
from tests.benchmarks.turns import allocator_peak
from train_rm import train_step

LAYERS = 2
CONFIG = dataclasses.replace(
    made.LLAMA, vocab_size=32000, dim=64, n_layers=LAYERS, n_heads=1, n_kv_heads=1, head_dim=64, hidden_dim=176,
    ropes=(Rope(tuple(1e-4 ** (i / 32) for i in range(32))),) * LAYERS, windows=(0,) * LAYERS, attn_scale=0.125,
)  # fmt: skip
CASES = {
    "text": (LanguageModel, CONFIG),
    "pair": (RewardModel, CONFIG),
    "text, windows of 2,048": (LanguageModel, dataclasses.replace(CONFIG, windows=(2048,) * LAYERS)),
    "text, capped attention": (LanguageModel, dataclasses.replace(CONFIG, attn_softcap=50.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="also write the page to this file")
    args = parser.parse_args()
    page, rows = Page("Memory of a step by the length of a dialogue", args), []
    for case in args.cases:
        before = None
        for length in args.lengths:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                tokens, allocated, resident = pool.submit(measured, case, length, args.threads).result()
            more = "" if before is None else f"{(allocated - before[1]) / (tokens - before[0]):,.0f}"
            before = tokens, allocated
            sizes = (allocated, planned(case, length), resident)
            rows.append([case, f"{length:,}", f"{tokens:,}", *(f"{x / MIB:,.0f}" for x in sizes), more])
    head = ["dialogue", "tokens", "tokens of the micro-batch", "allocated, MiB", "planned, MiB", "peak RSS, MiB",
            "bytes a token more"]  # fmt: skip
    page.add(table(head, rows))
    page.finish()


def batches_of(case: str, length: int) -> StepBatches:
    """One micro-batch of one dialogue."""

    def ids(n: int) -> np.ndarray:
        return np.arange(n, dtype=np.int32) % CONFIG.vocab_size

    if CASES[case][0] is RewardModel:
        reply = length // 4
        example = Example(ids(length - reply), (ids(reply), ids(reply)[::-1]), (np.zeros(reply, bool),) * 2)
    else:
        example = Example(ids(0), (ids(length),), (np.ones(length, bool),))
    batch = pack(Examples.build([example]), [0])
    return StepBatches([batch], num_examples=1, num_labels=len(batch.targets), num_tokens=1, seed=0)


def measured(case: str, length: int, threads: int) -> tuple[int, int, int]:
    """Tokens of the micro-batch, and bytes at the peak of a step: allocated tensors, and the resident process."""
    torch.set_num_threads(threads)
    cls, config = CASES[case]
    with dist.session(seed=0):
        model = made.model(cls, config)
        sharding.parallelize(model, ParallelSettings(dtype="float32"), recompute="full")
        optimizer, batches = optim.adamw(model, OptimSettings()), batches_of(case, length)
        train_step(model, optimizer, batches_of(case, 64), 1.0)  # makes Adam's moments
        moments = [x for state in optimizer.state.values() for x in state.values()]
        lasting = sum(x.nbytes for x in (*model.parameters(), *moments))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(model, optimizer, batches, 1.0)
    return len(batches.micro_batches[0].tokens), lasting + allocator_peak(profiler), dist.peak_memory()


def planned(case: str, length: int) -> int:
    """Bytes of the same by `rm.plan`."""
    cls, config = CASES[case]
    kernel = PlannedCappedAttention if config.attn_softcap else PlannedSplitAttention
    with dist.fake_process_group(1), torch.device("meta"):
        model = cls(config, kernel)
        sharding.parallelize(model, ParallelSettings(dtype="float32"), recompute="full")
    with dist.fake_process_group(1):
        footprint = memory.of_step(model, batches_of(case, length))
    return footprint.peak


if __name__ == "__main__":
    main()
