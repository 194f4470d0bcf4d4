"""rm.cli: the exit status of a command, and when torchrun may start it again."""

import os
import signal
import subprocess
import sys

import pytest

from rm import cli


@pytest.mark.parametrize(
    ("error", "restarts", "ends_torchrun"),
    [
        (ValueError("a wrong flag"), "3", True),
        (ValueError("a wrong flag"), "0", False),
        (OSError("no disk"), "3", False),
        (SystemExit(2), "3", True),  # from argparse: an unknown flag
        (SystemExit(0), "3", False),
    ],
)
def test_torchrun_does_not_restart_a_users_mistake(error, restarts, ends_torchrun, monkeypatch):
    kills, exits = [], []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    monkeypatch.setattr(os, "kill", lambda *call: kills.append(call))
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(SystemExit), cli.one_line_errors():
        raise error
    assert kills == [(os.getppid(), signal.SIGTERM)] * ends_torchrun
    assert exits == [0 if error.args == (0,) else 2]


def test_a_mistake_is_said_again_below_what_torchrun_prints():
    child = """
import argparse
from rm import cli
with cli.one_line_errors():
    try:
        raise ValueError("no file \\x1b[2J\\nof this name")
    except ValueError as error:
        argparse.ArgumentParser(prog="train", usage="u").error("no file")
"""
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    launcher = ["sh", "-c", '"$@"; echo "noise of the launcher" >&2', "sh", sys.executable, "-c", child]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stderr.splitlines() == [
        "usage: u", "train: error: no file", "noise of the launcher", r"error: no file \x1b[2J\nof this name",
    ]  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_under_torchrun_an_abort_in_pythons_shutdown_does_not_fail_a_run(launcher):
    code = """
import atexit, os
from rm import cli
from rm.distributed import process_group as dist
atexit.register(os.abort)
with cli.one_line_errors(), dist.session(0):
    print("done")
"""
    environment = os.environ | ({"TORCHELASTIC_RUN_ID": "1"} if launcher == "torchrun" else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n"
    assert done.returncode == (0 if launcher == "torchrun" else -signal.SIGABRT)


def test_a_report_ends_with_the_pipe_it_is_written_to():
    reading, writing = os.pipe()
    os.close(reading)
    if (child := os.fork()) == 0:
        cli.end_with_the_pipe()
        os.write(writing, b"a line")
        os._exit(0)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGPIPE
