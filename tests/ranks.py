"""Run a function on several ranks, as forked processes in one gloo group; takes tenths of a second.

    def sum_of_ranks(offset):
        return dist.sum_over_ranks(torch.tensor([dist.rank() + offset])).item()

    assert run_ranks(2, sum_of_ranks, 10) == [21, 21]

The processes inherit what the caller has imported and created, so that `function` may be a closure.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as torch_dist

TIMEOUT = 60  # seconds; a hang of the group is a failure, not a wait


def run_ranks(world_size: int, function: Callable, *args, timeout: float = TIMEOUT) -> list:
    """`function(*args)` on every rank of a group of `world_size`; its results in rank order.

    Raises RuntimeError with the traceback of the rank that failed first, or TimeoutError; where ranks hang,
    their stacks go to stderr.
    """
    assert not torch_dist.is_initialized(), "the ranks would inherit this process's group"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        with running(ranks):
            codes = _exit_codes(ranks, timeout)

        errors = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
        if errors:  # report the first to fail: the others may have failed because they lost it
            raise RuntimeError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
        if any(codes.values()):
            raise RuntimeError(f"ranks died without an error message, exit codes {codes}")
        if len(codes) < world_size:
            raise TimeoutError(f"{function} on {world_size} ranks did not end within {timeout} s")
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


@contextlib.contextmanager
def running(processes: list) -> Iterator[None]:
    """Start forked processes, and kill those that are left at the end of the block."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # otherwise every process would print what is buffered now
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _exit_codes(ranks: list, timeout: float) -> dict[int, int]:
    """Rank -> exit code of the ranks that end in time; once one has failed, the others get one more second."""
    deadline = time.monotonic() + timeout
    while running := [process.sentinel for process in ranks if process.exitcode is None]:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 1)
        if not wait(running, max(0, deadline - time.monotonic())):
            break
    return {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode is not None}


def _rank(rank: int, world_size: int, folder: Path, timeout: float, function: Callable, args: tuple) -> None:
    faulthandler.dump_traceback_later(max(1, timeout - 2), file=sys.__stderr__)
    torch.set_num_threads(1)  # a forked process must not use the OpenMP threads of its parent
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        torch_dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(function(*args), folder / f"{rank}.result")
        # A rank that leaves early breaks the connections of ranks that still join; a barrier would end the same way.
        while len(list(folder.glob("*.result"))) < world_size and not any(folder.glob("*.error")):
            time.sleep(0.002)
        torch_dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without the parent's exit handlers, and without waiting for the group
    os._exit(0)
