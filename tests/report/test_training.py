"""rm.report.training: a training run's page, from whatever metrics.jsonl holds."""

import builtins
import json
import subprocess
import sys

import pytest

from rm.distributed import process_group as dist
from rm.report import training
from tests.report.test_html import Tags


@pytest.fixture
def run(tmp_path):
    """A folder with the metrics of a run that was resumed at step 4 and is writing its last line."""
    same = {"accuracy": 0.5, "learning_rate": 1e-5, "grad_norm": 1.0, "tokens_per_second": 100.0}
    lines = [{"step": s, "epoch": s / 10, "loss": 0.7 - s / 100} | same for s in (2, 4, 6, 4, 6, 8)]
    lines.append({"step": 8, "epoch": 0.8, "eval_loss": 0.6, "eval_accuracy": 0.7})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
    settings = {"settings": {"learning_rate": 1e-5, "dataset_path": ["<b>x</b>.jsonl"]}, "processes": 2}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_page_shows_curves_last_values_and_settings(run):
    pytest.importorskip("matplotlib")
    page = training.write(run).read_text()
    seen = Tags(page)
    labels = [attributes["aria-label"] for tag, attributes in seen.found if tag == "svg"]
    assert labels == ["Loss", "Accuracy", "Learning rate", "Gradient norm before clipping", "Throughput"]
    assert "held out" in seen.text and "<b>x</b>.jsonl" in seen.text and "2 processes" in seen.text
    assert page == training.write(run).read_text()  # the same run, the same bytes


def test_a_step_computed_again_after_a_resume_counts_once_with_its_later_value():
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"step": 4, "loss": 1.0}, {"step": 6, "other": 1}]
    assert training._points(lines, "loss") == ([2, 4], [3.0, 1.0])
    assert training._points(lines, "accuracy") is None


def without_matplotlib(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_matplotlib_the_page_says_how_to_get_figures(run, monkeypatch):
    without_matplotlib(monkeypatch)
    page = training.write(run).read_text()
    assert "pip install matplotlib" in page and "<svg" not in page and "grad_norm" in page


def test_a_page_that_cannot_be_written_does_not_end_a_run(run, capsys):
    (run / "run.json").write_text("{broken")
    with dist.session(0):
        training.write_for(run)
    assert "report.html was not written" in "".join(capsys.readouterr())
    assert not (run / "report.html").exists()


def test_the_command_names_a_folder_that_holds_no_run(tmp_path):
    done = subprocess.run([sys.executable, "-m", "rm.report", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds no metrics" in done.stderr
