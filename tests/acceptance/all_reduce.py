"""How fast gradients are summed over all processes, and how long the host waits for the flags of a step.

torchrun --nproc-per-node N -m tests.acceptance.all_reduce         prints one line of JSON
"""

import json
import statistics
import time

import torch

from rm.distributed import process_group as dist

BYTES = {"cuda": 2**30, "cpu": 2**24}
STEP = 0.02  # seconds between sending and taking the flags


def measure() -> dict[str, float]:
    """`wait`, in seconds, and `bytes_per_second`: what a process sends in a ring (bus bandwidth in nccl-tests)."""
    x = torch.zeros(BYTES[dist.device().type] // 4, device=dist.device())
    seconds = statistics.median(_seconds_to_sum(x) for _ in range(8))
    n = dist.world_size()
    return {"bytes_per_second": 2 * (n - 1) / n * x.nbytes / seconds, "wait": _wait_for_flags()}


def _seconds_to_sum(x: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.sum_over_ranks(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _wait_for_flags() -> float:
    """Seconds of the host for both halves of an `AsyncSum` with a step between them; the median."""
    flags, waits = dist.AsyncSum(), []
    for _ in range(20):
        start = time.perf_counter()
        flags.send(1.0)
        sent = time.perf_counter()
        time.sleep(STEP)
        taken = time.perf_counter()
        flags.take()
        waits.append(sent - start + time.perf_counter() - taken)
    return statistics.median(waits)


if __name__ == "__main__":
    with dist.session(0):
        measured = measure()
        if dist.is_main():
            print(json.dumps(measured))
