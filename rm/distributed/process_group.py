"""The process group, this process's device, and collectives over ranks.

Everything runs in a process group, of one rank where there is one process, so that no other file has to ask whether it
is distributed. Other files import this one as `dist`.
"""

import contextlib
import ctypes
import datetime
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from tqdm import tqdm

import rm
from rm.terminal import printable

T = TypeVar("T")


class Stopped(Exception):
    """The run received a stop signal and leaves, on all ranks at the same step.

    Attributes:
        signal: the number of the signal that this process received; SIGTERM where only another rank received one.
    """

    def __init__(self, reason: str, signal: int = signal.SIGTERM):
        super().__init__(reason)
        self.signal = signal


# How long a rank waits for others. To connect, and in NCCL's collectives, where a rank that never arrives is an error:
CONNECT_TIMEOUT = datetime.timedelta(minutes=10)
# In gloo's collectives, since one rank may download or tokenize for hours while the others wait. A rank that dies is
# noticed at once, as its connections are closed, and a machine that dies by the launcher.
GLOO_TIMEOUT = datetime.timedelta(hours=24)


@contextlib.contextmanager
def session(seed: int) -> Iterator[None]:
    """Join the process group that torchrun describes in the environment, or make one of a single rank.

    Raises:
        ValueError: the machine has GPUs that torch cannot use.
    """
    _end_with_the_launcher()
    _set_allocator()
    check_accelerators()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        torch_dist.init_process_group(backend, timeout=CONNECT_TIMEOUT)
        if world_size() > 1:
            from rm.distributed.torch_private import set_gloo_timeout

            set_gloo_timeout(GLOO_TIMEOUT)
    else:  # a store in memory needs no port, so that runs on one machine cannot collide
        store = torch_dist.HashStore()
        torch_dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=CONNECT_TIMEOUT)
    torch.manual_seed(seed)
    _keep_freed_memory()
    all_ranks_leave = False
    try:
        yield
        all_ranks_leave = True
    except Stopped:
        all_ranks_leave = True
        raise
    finally:
        # To destroy an NCCL group is a collective: after an error on one rank it would wait for ranks that are in
        # another collective or dead. The process ends without it (`rm.cli`).
        if torch_dist.is_initialized() and (all_ranks_leave or world_size() == 1):  # `fake_process_group` replaces it
            torch_dist.destroy_process_group()


def _set_allocator() -> None:
    """Let the memory blocks of CUDA's caching allocator grow; the user's own setting is kept.

    Micro-batches have many lengths, and blocks of fixed size that fit one do not fit the next. The environment
    variable alone would do nothing here: torch read it when it was imported.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second until torch 2.9; it is still read
    if torch.cuda.is_available() and not any(name in os.environ for name in names):
        from rm.distributed.torch_private import allow_blocks_to_grow

        allow_blocks_to_grow()


def check_accelerators() -> None:
    """Say which accelerators are not used, and raise ValueError for GPUs that torch cannot use.

    A driver that is too old for torch, or a torch without CUDA, would otherwise train on the CPU in silence.
    """
    if torch.cuda.is_available():
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        say(f"torch has an accelerator of type {accelerator.type}, which is not used: this runs on the CPU")
    where = _names_gpus()
    if where:
        raise ValueError(
            f"there are GPUs ({where}), and torch {torch.__version__} cannot use them: {_why_no_cuda()} Or set "
            f'CUDA_VISIBLE_DEVICES="" to run on the CPU'
        )


def _names_gpus() -> str | None:
    """What says that this process is to have GPUs; None where nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        is_none = visible.strip() in ("", "-1", "NoDevFiles")  # the last: SLURM's, for a job that is granted no GPU
        return None if is_none else f"CUDA_VISIBLE_DEVICES={visible}"
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if granted.isdecimal() and int(granted):
        return f"SLURM_GPUS_ON_NODE={granted}"
    names = gpus_of_the_driver()
    return f"nvidia-smi: {names[0].partition(' (UUID')[0]}" if names else None


def gpus_of_the_driver() -> list[str]:
    """nvidia-smi's line for each GPU of this machine; none where there is no such program."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in listed.splitlines() if line.startswith("GPU ")]


def _why_no_cuda() -> str:
    """The reason that torch has for not using CUDA, and what to do, in sentences."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "it was built without CUDA. Install a build with CUDA (https://pytorch.org/get-started/locally)."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
    else:
        reason = "it finds no device"
    return (
        f"{reason}. Update the driver, or install a build of torch for the driver's version of CUDA (this one is for "
        f"{torch.version.cuda or torch.version.hip})."
    )


@contextlib.contextmanager
def fake_process_group(processes: int) -> Iterator[None]:
    """A process group in which only this process, rank 0, exists: collectives return at once and move no data.

    It replaces the present group, and everything is on the CPU.
    """
    from rm.distributed.torch_private import FakeStore

    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies: a killed torchrun leaves its processes behind, still training."""
    if under_torchrun() and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != rm.LAUNCHER:  # it died before the call above
            os.kill(os.getpid(), signal.SIGTERM)


def _keep_freed_memory() -> None:
    """On the CPU, have glibc keep freed heap memory for the next micro-batch.

    By default glibc returns the heap to the system whenever its top is free, which is after every micro-batch, and the
    next micro-batch's memory is zeroed page by page again: 15 % of a step on two cores, for no lower peak. 32 MiB is
    the largest M_MMAP_THRESHOLD that glibc accepts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS has none
    if mallopt and not torch.cuda.is_available():
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def under_torchrun() -> bool:
    """Whether torchrun started this process and monitors its exit status."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an error may come from the end of another process: a collective then raises a plain RuntimeError."""
    return world_size() > 1 and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)


def is_lost_connection(error: BaseException) -> bool:
    """Whether gloo has lost another process; its error has no type of its own. NCCL's may have other reasons."""
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    is_fake = torch_dist.is_initialized() and torch_dist.get_backend() == "fake"
    if torch.cuda.is_available() and not is_fake:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def device_name() -> str:
    """What the device is called by its maker."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """This process's peak memory in bytes: allocated tensors on a GPU, the whole resident set on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, on every rank, in place."""
    torch_dist.all_reduce(x)
    return x


def concat_over_ranks(x: Tensor) -> Tensor:
    """Every rank's `x` concatenated along its first dimension in rank order, on every rank; lengths may differ."""
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    lengths[rank()] = len(x)
    sizes = sum_over_ranks(lengths).tolist()
    # all_gather needs equal shapes on all ranks: pad to the longest, and cut the padding off afterwards.
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch_dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; the same answer on every rank."""
    return bool(sum_over_ranks(torch.tensor([int(flag)])).item())


class AsyncSum:
    """A few numbers summed over ranks without waiting: `send` starts the all-reduce, `take` returns it a step later.

    On the CPU (gloo) whatever the device, so that no step waits for the device.
    """

    def __init__(self):
        self.pending: tuple | None = None  # (values, handle of the all-reduce)

    def send(self, *numbers: float) -> None:
        assert self.pending is None, "the sums sent before have to be taken first"
        values = torch.tensor(numbers, dtype=torch.float64)
        self.pending = values, torch_dist.all_reduce(values, async_op=True)

    def take(self) -> list[float] | None:
        """The sums that were sent last; None if none were, or they have been taken."""
        if self.pending is None:
            return None
        values, handle = self.pending
        handle.wait()
        self.pending = None
        return values.tolist()


def once_per_node(action: Callable[[], object]) -> None:
    """Call `action` in one process of every machine while the others wait. A failure is raised on every rank.

    Without a process group, as in `Scorer` and the commands on models, this process calls it.
    """
    if not torch_dist.is_initialized():
        action()
        return
    _for_all(action if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None)


def on_main(action: Callable[[], T]) -> T | None:
    """Call `action` in the main process while the others wait, who get None. A failure is raised on every rank."""
    return _for_all(action if is_main() else None)


def _for_all(action: Callable[[], T] | None) -> T | None:
    """Call the action, on ranks that have one. Where it fails on any rank, every rank raises ValueError or OSError."""
    result = error = None
    if action is not None:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    if any_rank(error is not None):
        raise error or ValueError("stopped, since another process failed")
    return result


def barrier() -> None:
    """Wait until every rank has arrived.

    On the CPU: an all-reduce on a GPU would only make the device wait, not the host.
    """
    sum_over_ranks(torch.zeros(1))


def say(text: str) -> None:
    """Print a line from the main process, without breaking the progress bar."""
    if is_main():
        tqdm.write(printable(text))


def progress(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """The items; on a terminal, a bar of the main process counts them if they take more than a few seconds."""
    hidden = None if is_main() else True  # None: hidden unless stderr is a terminal
    counted = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}" if hasattr(items, "__len__") else "{n_fmt}"
    form = f"{{desc}}: {counted} {unit}, {{elapsed}}"
    shown = printable(what)
    return iter(tqdm(items, desc=shown, bar_format=form, delay=3, leave=False, dynamic_ncols=True, disable=hidden))
