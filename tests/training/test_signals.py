"""rm.training.signals: signals are heard whatever the main thread does, a run that hangs says where, and nobody is
left behind.
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
with Watchdog(stall_timeout={stall}) as watch:
    watch.beat()
    print("ready", flush=True)
    {body}
"""


def process(body: str, stall: float = 0, **streams) -> subprocess.Popen:
    code = HANGS.format(body=body, stall=stall)
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **streams)
    assert made.stdout.readline() == "ready\n"
    return made


def test_a_signal_is_heard_while_the_main_thread_waits_and_may_come_often():
    with Watchdog(stall_timeout=0) as watch:
        assert watch.asked is None
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 5
        while watch.asked is None and time.monotonic() < until:
            time.sleep(0.01)
        assert (watch.asked, watch.number) == ("SIGUSR1", signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_hangs_shows_its_stacks_and_ends():
    hung = process("threading.Event().wait()", stall=0.4, stderr=subprocess.PIPE)
    _, said = hung.communicate(timeout=20)
    assert hung.returncode == STALLED
    assert "[rank 0] no progress for" in said and "--stall_timeout 0.4" in said
    assert "most recent call first" in said and "threading.py" in said and "_look" in said


def test_the_first_step_may_take_longer_and_every_beat_begins_anew():
    slow = process("[(time.sleep(0.2), watch.beat()) for i in range(9)]", stall=1.5)
    assert slow.wait(timeout=20) == 0
    waiting = Watchdog(stall_timeout=10)
    assert waiting.patience > 1
    waiting.beat()
    assert waiting.patience == 1


def test_a_process_that_was_suspended_has_not_stalled():
    run = process(
        "from rm.training import signals; signals.SUSPENDED = 0.5; print('now', flush=True); time.sleep(3)", stall=2
    )
    assert run.stdout.readline() == "now\n"
    run.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    run.send_signal(signal.SIGCONT)
    assert run.wait(timeout=20) == 0


def test_at_a_terminal_a_second_ctrl_c_ends_it_at_once_but_not_a_signal_that_came_twice():
    ours, theirs = pty.openpty()
    run = process("threading.Event().wait(20)", stderr=theirs)
    for _ in range(2):  # as torchrun and the terminal do, both at one Ctrl-C
        run.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=5) == 128 + signal.SIGINT
    said = os.read(ours, 4096).decode()
    assert "SIGINT: saving after this step" in said and "left at once" in said


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_whose_launcher_is_killed_does_not_live_on(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        launcher_of_it = os.getpid()
        if os.fork() == 0:
            monkeypatch.setattr("rm.LAUNCHER", launcher_of_it)
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
    assert os.read(reader, 5) == b"" and time.monotonic() - began < 5  # its end of the pipe is closed: it is gone
    os.close(reader)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_whose_launcher_died_while_it_began_ends(tmp_path):
    code = """
import os, time, rm
from rm import dist
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
