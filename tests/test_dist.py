"""dist: what torchrun is told of a process that failed."""

import os
import signal

import pytest

from rm import dist


@pytest.mark.parametrize(
    ("error", "restarts", "told"),
    [
        (ValueError("a wrong flag"), "3", True),
        (ValueError("a wrong flag"), "0", False),
        (OSError("no disk"), "3", False),
    ],
)
def test_torchrun_starts_a_mistake_only_once(error, restarts, told, monkeypatch):
    kills = []
    monkeypatch.setattr(os, "kill", lambda *call: kills.append(call))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(SystemExit), dist.one_line_errors():
        raise error
    assert kills == [(os.getppid(), signal.SIGTERM)] * told
