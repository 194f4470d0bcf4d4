"""dist: what torchrun is told of a process that failed."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from rm import cli
from rm.distributed import process_group as dist


@pytest.mark.parametrize(
    ("error", "restarts", "told"),
    [
        (ValueError("a wrong flag"), "3", True),
        (ValueError("a wrong flag"), "0", False),
        (OSError("no disk"), "3", False),
        (SystemExit(2), "3", True),  # argparse's, of a flag that there is not
        (SystemExit(0), "3", False),
    ],
)
def test_torchrun_starts_a_mistake_only_once(error, restarts, told, monkeypatch):
    kills, ends = [], []
    monkeypatch.setattr(os, "kill", lambda *call: kills.append(call))
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(SystemExit), cli.one_line_errors():
        raise error
    assert kills == [(os.getppid(), signal.SIGTERM)] * told
    assert ends == [0 if error.args == (0,) else 2]


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_under_torchrun_what_python_does_as_it_ends_can_make_no_failure_of_a_success(launcher):
    code = """
import atexit, os
from rm import dist
atexit.register(os.abort)
with dist.one_line_errors(), dist.session(0):
    print("done")
"""
    environment = os.environ | ({"TORCHELASTIC_RUN_ID": "1"} if launcher == "torchrun" else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n"
    assert done.returncode == (0 if launcher == "torchrun" else -signal.SIGABRT)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")
def test_memory_freed_after_a_row_is_there_for_the_next():
    """Fifty blocks of 8 MiB, freed and taken again, cost glibc's own way 102,400 page faults; ours none."""
    words = [
        sys.executable,
        "-c",
        "from tests.distributed.test_process_group import _faults_of_a_second_row as f; print(f())",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split()[-2:])
    assert kept < 1000 < returned


def _faults_of_a_second_row() -> str:
    import torch

    def row() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = [torch.ones(2**21) for _ in range(50)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    _, returned = row(), row()
    with dist.session(0):
        *_, kept = row(), row(), row(), row()
    return f"{kept} {returned}"
