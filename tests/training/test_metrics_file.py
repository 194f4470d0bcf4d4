"""rm.training.metrics_file: no line is lost or repeated on resume, or on a full disk."""

import json
from pathlib import Path

import pytest

from rm.training.metrics_file import MetricsFile


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in open(file)]


def test_lines_after_the_step_and_an_incomplete_line_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3}\n{"step": 4, "lo')
    metrics = MetricsFile(file, 2)
    assert [metrics.has_evaluation(step) for step in (1, 2, 3)] == [False, True, False]
    assert len(file.read_text()) > 60  # not truncated yet
    metrics.begin()
    metrics.write({"step": 3})
    assert steps(file) == [1, 2, 3] and [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_file_begins_empty(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.begin()
    metrics.write({"step": 1})
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_lines_that_did_not_fit_on_a_full_disk_are_written_with_the_next(tmp_path, capsys):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.begin()
    real, metrics.file = metrics.file, Path("/dev/full")
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    assert capsys.readouterr().err.count("No space left on device; it will be tried again") == 2
    metrics.file = real
    metrics.write({"step": 3})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_last_line_that_was_not_written_is_written_by_flush(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.begin()
    real, metrics.file = metrics.file, Path("/dev/full")
    metrics.write({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        metrics.flush()
    metrics.file = real
    metrics.flush()
    metrics.flush()
    assert steps(real) == [1]
