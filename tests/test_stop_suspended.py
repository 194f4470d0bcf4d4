"""stop: what the watchdog takes for a stall. Signals and stalls of whole runs: test_resume.py, tests/cluster."""

import multiprocessing
import os
import signal
import time

import pytest

from rm import stop


def sleeper(seconds: float) -> None:
    """A process that is watched and does nothing."""
    stop.SUSPENDED = 0.5
    with stop.Watch(stall_timeout=1) as watch:
        watch.beat()
        time.sleep(seconds)


@pytest.mark.parametrize(("seconds", "suspended", "status"), [(2.3, 1.5, 0), (3, 0, stop.STALLED)])
def test_a_process_that_was_suspended_has_not_stalled(seconds, suspended, status):
    process = multiprocessing.get_context("fork").Process(target=sleeper, args=(seconds,))
    process.start()
    time.sleep(0.3)
    if suspended:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(suspended)
        os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == status
