"""rm.training.metrics_file: a file of lines that is cut back, or goes on after a full disk, without losing or
repeating one.
"""

import json
from pathlib import Path

from rm.training.metrics_file import MetricsFile


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in open(file)]


def test_lines_after_the_step_and_a_line_that_was_cut_off_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3}\n{"step": 4, "lo')
    journal = MetricsFile(file, 2)
    assert journal.has(2, "eval_") and not journal.has(1, "eval_") and not journal.has(3, "eval_")
    assert len(file.read_text()) > 60  # nothing is changed yet
    journal.begin()
    journal.write({"step": 3})
    assert steps(file) == [1, 2, 3] and [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_file_begins_empty(tmp_path):
    journal = MetricsFile(tmp_path / "metrics.jsonl", 0)
    journal.begin()
    journal.write({"step": 1})
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_what_a_full_disk_did_not_take_is_written_with_the_next_line(tmp_path, capsys):
    journal = MetricsFile(tmp_path / "metrics.jsonl", 0)
    journal.begin()
    real, journal.file = journal.file, Path("/dev/full")
    journal.write({"step": 1})
    journal.write({"step": 2})
    assert capsys.readouterr().err.count("No space left on device; it will be tried again") == 2
    journal.file = real
    journal.write({"step": 3})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
