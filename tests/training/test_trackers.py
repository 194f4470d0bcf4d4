"""rm.training.trackers: the same lines in metrics.csv, TensorBoard and Weights & Biases; and a readable log file."""

import csv
import json
import time

import pytest
import torch

from rm.data.batch import StepBatches
from rm.data.sets import UNNAMED
from rm.training import run_log, trackers
from tests.ranks import run_ranks

BATCHES = StepBatches(micro_batches=[], num_examples=2, num_labels=0, num_tokens=10, seed=0)


def run(folder, start: int = 0, tool: str = "none", steps: int = 4) -> None:
    settings = run_log.RunSettings(output_dir=str(folder), logging_steps=2, report_to=tool)
    with run_log.RunLog(settings, settings, steps, 4, {}, run_log.Start(step=start)) as log:
        for step in range(start + 1, steps + 1):
            sums = {"loss": torch.tensor(2.0 * step), "count": torch.tensor(2.0)}
            log.log_step(step, sums, torch.tensor(1.0), 1e-3, BATCHES, "pairs")
        log.log_evaluation(steps, {UNNAMED: {"loss": 0.5}})


def test_metrics_csv_has_every_line_and_every_name(tmp_path):
    run_ranks(1, run, tmp_path)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv", newline="")))
    assert len(rows) == len(lines) == 3
    for row, line in zip(rows, lines, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == line


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_ranks(1, run, tmp_path, 0, "tensorboard")
    run_ranks(1, run, tmp_path, 2, "tensorboard", 6)  # from a checkpoint of step 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(6, 0.5)]


def test_wandb_keeps_every_line_offline_in_one_run_when_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("sys.argv", ["train_rm.py", "--dataset_path", "https://user:a-password@host/pairs"])
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
        assert b"https://***@host/pairs" in kept and b"a-password" not in kept  # the command line is among them


def test_a_tool_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb: the package wandb is not installed; pip install wandb"):
        run_log.RunSettings(output_dir="x", report_to="wandb")


def test_wandb_without_a_login_is_refused_on_every_rank(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(verify: bool) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "login", refuse)

    def message() -> str:
        with pytest.raises(ValueError) as refused:
            trackers.log_in("wandb")
        return str(refused.value)

    first, second = run_ranks(2, message)
    assert first == (
        "--report_to wandb: No API key configured. Use `wandb login` to log in. Without its server: "
        "WANDB_MODE=offline, or --report_to none"
    )
    assert second == "stopped, since another process failed"
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.log_in("wandb")


def test_wandb_has_the_error_that_is_expected_of_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(wandb.Error, match="API key"):
        wandb.login(verify=True)


def test_a_log_file_has_lines_and_no_progress_bar(tmp_path, capfd):
    run_ranks(1, run, tmp_path)
    out, err = capfd.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 2/4"] + 3 * ["step 4/4"]
    assert "\r" not in out + err and "%|" not in out + err
