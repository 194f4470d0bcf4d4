"""rm.distributed.process_group: how a session begins and ends, and memory that glibc keeps between micro-batches."""

import datetime
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist

from rm import cli
from rm.distributed import process_group as dist


def run_sessions(ranks: int, folder: Path, body: Callable[[], None], timeout: float = 60) -> list[int | None]:
    """`body` in a session of every rank, as a script runs it; stderr goes to RANK.stderr in the folder.

    Returns:
        The exit code of every rank, None of one that did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def run(rank: int) -> None:
        os.dup2(os.open(folder / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)
        here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in here.items()})
        torch.set_num_threads(1)
        with cli.one_line_errors(), dist.session(0):
            body()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def test_the_message_of_a_failed_rank_is_printed_and_all_ranks_end(tmp_path):
    def body():
        torch_dist.destroy_process_group = lambda *_: time.sleep(300)  # NCCL's waits for ranks that do not call it
        dist.barrier()
        if dist.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        dist.barrier()

    assert run_sessions(3, tmp_path, body, timeout=60) == [1, 1, 1]
    message = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert message in (tmp_path / "1.stderr").read_text()
    for rank in (0, 2):
        (line,) = (tmp_path / f"{rank}.stderr").read_text().splitlines()
        assert f"error [rank {rank}]: another process has ended or cannot be reached" in line


def test_where_a_rank_is_killed_the_others_end_and_say_so(tmp_path):
    def body():
        dist.barrier()
        if dist.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    assert run_sessions(2, tmp_path, body) == [-signal.SIGKILL, 1]
    (line,) = (tmp_path / "1.stderr").read_text().splitlines()
    assert "error [rank 1]: another process has ended or cannot be reached" in line


def test_ranks_wait_longer_for_one_that_works_than_for_one_that_connects(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "CONNECT_TIMEOUT", datetime.timedelta(seconds=2))

    def body():
        if dist.rank() == 1:
            time.sleep(3)  # as a download or tokenizing
        dist.barrier()

    assert run_sessions(2, tmp_path, body) == [0, 0]


@pytest.fixture
def no_cuda(monkeypatch):
    """A machine without variables that grant GPUs and without nvidia-smi, whose torch has no CUDA."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist.shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_gpus_that_torch_cannot_use_are_an_error(variables, named, no_cuda, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", None)
    if named is None:
        dist.check_accelerators()
        return
    with pytest.raises(ValueError) as error:
        dist.check_accelerators()
    text = str(error.value)
    assert named in text and 'set CUDA_VISIBLE_DEVICES="" to run on the CPU' in text
    assert "built without CUDA. Install" in text


def test_nvidia_smi_names_gpus_that_torch_cannot_use(no_cuda, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(dist.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    too_old = "The NVIDIA driver on your system is too old (found version 11040). Please update"

    def init():
        raise RuntimeError(too_old)

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError, match="nvidia-smi: GPU 0: NVIDIA A100-SXM4-80GB.*too old.*Update the driver"):
        dist.check_accelerators()


def test_an_accelerator_that_is_not_used_is_named(no_cuda, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    dist.check_accelerators()
    assert "accelerator of type mps, which is not used: this runs on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, []),
    ],
)
def test_the_users_setting_of_the_allocator_is_kept(given, expected, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_to.append)
    monkeypatch.setattr(os, "environ", dict(given))
    dist._set_allocator()
    assert set_to == expected and os.environ == given


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_freed_after_a_micro_batch_is_kept_for_the_next():
    """Fifty blocks of 8 MiB, freed and allocated again, cost 102,400 page faults by glibc's default, and none here."""
    code = "from tests.distributed.test_process_group import _page_faults as f; print(f())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split()[-2:])
    assert kept < 1000 < returned


def _page_faults() -> str:
    """Of a repeated micro-batch: within a session, and before it."""
    import torch

    def micro_batch() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = [torch.ones(2**21) for _ in range(50)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    _, returned = micro_batch(), micro_batch()
    with dist.session(0):
        *_, kept = micro_batch(), micro_batch(), micro_batch(), micro_batch()
    return f"{kept} {returned}"
