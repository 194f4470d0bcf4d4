"""rm.training.signals: a signal is noticed whatever the main thread does, a run that hangs prints its stacks, and no
process outlives its launcher.
"""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from rm.distributed import process_group as dist
from rm.training.signals import STALLED, Watchdog

HANGS = """
import threading, time
from rm.training.signals import Watchdog
with Watchdog(stall_timeout={stall}) as watchdog:
    watchdog.heartbeat()
    print("ready", flush=True)
    {body}
"""


def process(body: str, stall: float = 0, **streams) -> subprocess.Popen:
    code = HANGS.format(body=body, stall=stall)
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **streams)
    assert started.stdout.readline() == "ready\n"
    return started


def test_a_signal_is_noticed_while_the_main_thread_waits_and_may_be_repeated():
    with Watchdog(stall_timeout=0) as watchdog:
        assert watchdog.stop_signal is None
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 5
        while watchdog.stop_signal is None and time.monotonic() < until:
            time.sleep(0.01)
        assert (watchdog.stop_signal, watchdog.signal_number) == ("SIGUSR1", signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_hangs_prints_its_stacks_and_ends():
    hung = process("threading.Event().wait()", stall=0.4, stderr=subprocess.PIPE)
    _, printed = hung.communicate(timeout=20)
    assert hung.returncode == STALLED
    assert "[rank 0] no progress for" in printed and "--stall_timeout 0.4" in printed
    assert "most recent call first" in printed and "threading.py" in printed and "_check_progress" in printed


def test_the_first_step_may_take_longer_and_a_heartbeat_restarts_the_timeout():
    slow = process("[(time.sleep(0.2), watchdog.heartbeat()) for i in range(9)]", stall=1.5)
    assert slow.wait(timeout=20) == 0
    waiting = Watchdog(stall_timeout=10)
    assert waiting.timeout_scale > 1
    waiting.heartbeat()
    assert waiting.timeout_scale == 1


def test_a_process_that_was_suspended_has_not_stalled():
    run = process(
        "import os, signal; from rm.training import signals; signals.SUSPENDED = 0.5; "
        "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(0.7)",
        stall=2,
    )
    os.waitid(os.P_PID, run.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(2.3)
    run.send_signal(signal.SIGCONT)
    assert run.wait(timeout=20) == 0


def test_a_second_ctrl_c_ends_a_run_at_once_but_not_one_that_came_twice():
    ours, theirs = pty.openpty()
    run = process("threading.Event().wait(20)", stderr=theirs)
    for _ in range(2):  # as torchrun and the terminal do, both at one Ctrl-C
        run.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=5) == 128 + signal.SIGINT
    printed = os.read(ours, 4096).decode()
    assert "SIGINT: saving after this step" in printed and "left at once" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="a feature of Linux")
def test_a_process_does_not_outlive_a_launcher_that_is_killed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        launcher_id = os.getpid()
        if os.fork() == 0:
            monkeypatch.setattr("rm.LAUNCHER", launcher_id)
            dist._end_with_the_launcher()
            os.write(writer, b"ready")
            time.sleep(30)
        time.sleep(30)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    began = time.monotonic()
    assert (
        os.read(reader, 5) == b"" and time.monotonic() - began < 5
    )  # the process has ended, which closes its end of the pipe
    os.close(reader)


@pytest.mark.skipif(sys.platform != "linux", reason="a feature of Linux")
def test_a_process_whose_launcher_died_during_its_start_ends(tmp_path):
    code = """
import os, time, rm
from rm.distributed import process_group as dist
open("began", "w")
while os.getppid() == rm.LAUNCHER:
    time.sleep(0.01)
dist._end_with_the_launcher()
open("trained on", "w")
"""
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}]).wait()"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": os.getcwd()}
    torchrun = subprocess.Popen([sys.executable, "-c", launcher], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    while not (tmp_path / "began").exists():
        assert torchrun.poll() is None
        time.sleep(0.01)
    torchrun.kill()
    assert torchrun.stdout.read() == b""  # until the last process that holds it has ended
    assert not (tmp_path / "trained on").exists()
