"""One process or many: the process group, this process's device, and sums over ranks.

Everything runs in a process group, of one rank where there is one process, so that no other file asks whether it is
distributed.
"""

import contextlib
import ctypes
import datetime
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor
from tqdm import tqdm

import rm


class Stopped(Exception):
    """The run was told to stop, on all ranks, and leaves; `signal` is the number of what this process was told by."""

    def __init__(self, reason: str, signal: int = signal.SIGTERM):
        super().__init__(reason)
        self.signal = signal


@contextlib.contextmanager
def session(seed: int) -> Iterator[None]:
    """Join the process group that torchrun describes in the environment, or make one of a single rank."""
    _end_with_the_launcher()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    timeout = datetime.timedelta(minutes=10)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        torch_dist.init_process_group(backend, timeout=timeout)
    else:  # a store in memory: no port, nothing to collide with
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    torch.manual_seed(seed)
    _keep_freed_memory()
    try:
        yield
    finally:
        if torch_dist.is_initialized():  # `on_paper` takes its place
            torch_dist.destroy_process_group()


@contextlib.contextmanager
def fake_process_group(processes: int) -> Iterator[None]:
    """A group of processes of which only this one, rank 0, exists: its collectives return at once and move nothing.

    It takes the place of the group that there is, and everything is on the CPU.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # here and not above: also makes the backend

    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Ask Linux for a SIGTERM when torchrun dies: killed, it leaves its processes behind, and they would train on."""
    if under_torchrun() and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != rm.LAUNCHER:  # it is dead already
            os.kill(os.getpid(), signal.SIGTERM)


def _keep_freed_memory() -> None:
    """Where tensors live in glibc's heap, on the CPU: keep what is freed for the next row.

    Left alone, glibc hands the heap back whenever its top is free, that is after every row, and the next row's memory
    is zeroed page by page again: 15 % of a step on two cores, and no lower peak. 32 MiB is the largest threshold below
    which it takes a block from the heap at all.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not on macOS
    if mallopt and not torch.cuda.is_available():
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def under_torchrun() -> bool:
    """Whether torchrun started this process, and watches how it ends."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an error may be another process's end: all that a collective has to say of it is RuntimeError."""
    return world_size() > 1 and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)


def rank() -> int:
    """This process's number, 0 to world() - 1."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks to the terminal."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    fake_process_group = torch_dist.is_initialized() and torch_dist.get_backend() == "fake"
    if torch.cuda.is_available() and not fake_process_group:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def peak_memory() -> int:
    """Bytes at this process's highest: of tensors on a GPU, as its allocator counts; all that is resident on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, on every rank, in place."""
    torch_dist.all_reduce(x)
    return x


def concat_over_ranks(x: Tensor) -> Tensor:
    """Every rank's 1-D `x` (lengths may differ), end to end in rank order, on every rank."""
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    lengths[rank()] = len(x)
    sizes = sum_over_ranks(lengths).tolist()
    padded = x.new_zeros(max(sizes))
    padded[: len(x)] = x
    everyone = [torch.empty_like(padded) for _ in sizes]
    torch_dist.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank: the same answer everywhere."""
    return bool(sum_over_ranks(torch.tensor([int(flag)])).item())


class AsyncSum:
    """A few numbers summed over ranks without waiting: what is sent now arrives at the next turn, on every rank.

    On the CPU (gloo) whatever the device, so that no step waits for the device.
    """

    def __init__(self):
        self.sent: tuple | None = None

    def send(self, *numbers: float) -> None:
        assert self.sent is None, "the sums sent before have to be taken first"
        values = torch.tensor(numbers, dtype=torch.float64)
        self.sent = values, torch_dist.all_reduce(values, async_op=True)

    def take(self) -> list[float] | None:
        """The sums that were sent last; None where nothing was, or it was taken."""
        if self.sent is None:
            return None
        values, work = self.sent
        work.wait()
        self.sent = None
        return values.tolist()


def once_per_node(work: Callable[[], object]) -> None:
    """Do some work on one process of every machine while the others wait. If it fails anywhere, it fails everywhere."""
    error = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            work()
        except (ValueError, OSError) as caught:
            error = caught
    if any_rank(error is not None):
        raise error or ValueError("stopped, since another process failed")


def barrier() -> None:
    """Wait until every rank is here. On the CPU: a sum on a GPU would be waited for by the device alone."""
    sum_over_ranks(torch.zeros(1))


def say(text: str) -> None:
    """A line on the terminal, from one process, without breaking the progress bar."""
    if is_main():
        tqdm.write(text)
