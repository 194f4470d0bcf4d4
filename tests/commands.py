"""Run the scripts and commands of this package in forked processes, as `python` and torchrun would start them.

    done = run("train_rm.py", "--dataset_path", file, "--output_dir", out, processes=2)
    assert done.returncode == 0, done.stderr

A process inherits what the tests have imported: it takes a second where a new one takes five, most of them for
importing torch. Command line, streams and exit status are those of a process of its own.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch

import rm
from tests.ranks import running

ROOT = Path(__file__).parent.parent


def run(program: str, *words, processes: int = 0, env: dict[str, str] | None = None, timeout: float = 60):
    """What `python program words` gives in the repository's root; it must end within `timeout` seconds.

    Args:
        program: a file as "train_rm.py", or a module as "rm.export", which `python -m` would start.
        processes: of a group; 0 is one without a group in its environment.
        env: further environment variables.

    Returns:
        A CompletedProcess. Of several processes, the status is that of the first to fail, which ends the others.
    """

    def start() -> None:
        sys.argv = [program, *map(str, words)]
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)

    return call(start, processes=processes, env=env, timeout=timeout)


def call(
    function: Callable[[], object], processes: int = 0, env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess:
    """`run` of a function."""
    variables = [dict(env or {}) for _ in range(processes or 1)]
    if processes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        for rank, of_rank in enumerate(variables):
            of_rank |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        ranks = [context.Process(target=_process, args=(function, v, stdout, stderr), daemon=True) for v in variables]
        with running(ranks):
            code = _first_failure(ranks, timeout)
        stdout.seek(0), stderr.seek(0)
        return subprocess.CompletedProcess(function, code, stdout.read(), stderr.read())


def _first_failure(ranks: list, timeout: float) -> int:
    """The status of the first process that fails; 0 once all have ended."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in ranks]
        if any(codes) or None not in codes:
            return next(filter(None, codes), 0)
        running = [process.sentinel for process, code in zip(ranks, codes, strict=True) if code is None]
        if not wait(running, max(0, deadline - time.monotonic())):
            raise TimeoutError(f"the processes did not end within {timeout} s")


def _process(function: Callable[[], object], env: dict[str, str], stdout, stderr) -> None:
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(env)
    os.chdir(ROOT)
    rm.LAUNCHER = os.getppid()
    torch.set_num_threads(1)  # a forked process must not use the OpenMP threads of its parent
    function()  # multiprocessing turns what it raises into a status, and runs no exit handlers of the tests
