"""rm.training.trackers: the same lines for a table, for TensorBoard and for Weights & Biases; and a log that a file
can hold.
"""

import csv
import json
import time

import pytest
import torch

from rm.training import run_log
from tests.ranks import run_ranks


def run(folder, start: int = 0, tool: str = "none", steps: int = 4) -> None:
    settings = run_log.RunSettings(output_dir=str(folder), logging_steps=2, report_to=tool)
    with run_log.RunLog(settings, steps, 4, {}, run_log.Start(step=start)) as record:
        for step in range(start + 1, steps + 1):
            sums = {"loss": torch.tensor(2.0 * step), "count": torch.tensor(2.0), "grad_norm": torch.tensor(1.0)}
            record.train(step, sums, 1e-3, examples=2, tokens=10, unit="pairs")
        record.evaluation(steps, {"loss": 0.5})


def test_the_table_has_every_line_and_every_name(tmp_path):
    run_ranks(1, run, tmp_path)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv", newline="")))
    assert len(rows) == len(lines) == 3
    for row, line in zip(rows, lines, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == line


def test_tensorboard_reads_what_was_written_and_a_run_that_goes_on_hides_what_it_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_ranks(1, run, tmp_path, 0, "tensorboard")
    run_ranks(1, run, tmp_path, 2, "tensorboard", 6)  # from a checkpoint of step 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(6, 0.5)]


def test_wandb_itself_keeps_every_line_offline_in_one_run_however_often_it_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_ranks(1, run, tmp_path, 0, "wandb")
    time.sleep(1)  # wandb names a folder by the second
    run_ranks(1, run, tmp_path, 2, "wandb", 6)  # from a checkpoint of step 2
    name = (tmp_path / "wandb_run_id").read_text()
    first, second = sorted(
        tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"), key=lambda f: f.stat().st_mtime
    )
    for file, losses in ((first, (b"1.5", b"3.5")), (second, (b"3.5", b"5.5"))):
        kept = file.read_bytes()  # records of names and values in JSON
        assert all(value in kept for value in (b"eval_loss", b"tokens_per_second", b"logging_steps", *losses))


def test_a_tool_that_is_not_installed_is_refused_before_anything_begins(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb: the package wandb is not installed; pip install wandb"):
        run_log.RunSettings(output_dir="x", report_to="wandb").check()


def test_in_a_file_the_log_is_a_line_at_a_time_without_a_progress_bar(tmp_path, capfd):
    run_ranks(1, run, tmp_path)
    out, err = capfd.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 2/4", "step 4/4", "step 4/4"]
    assert "\r" not in out + err and "%|" not in out + err
