"""rm.report.training: the HTML report of a training run."""

import builtins
import json

import pytest

from rm.distributed import process_group as dist
from rm.report import training
from tests import commands
from tests.html_tags import Tags


@pytest.fixture
def run(tmp_path):
    """The output folder of a run that was resumed at step 4 and is writing the last line of metrics.jsonl."""
    same = {"accuracy": 0.5, "learning_rate": 1e-5, "grad_norm": 1.0, "tokens_per_second": 100.0}
    lines = [{"step": step, "epoch": step / 10, "loss": 0.7 - step / 100} | same for step in (2, 4, 6, 4, 6, 8)]
    lines.append({"step": 8, "epoch": 0.8, "eval_loss": 0.6, "eval_accuracy": 0.7})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
    settings = {"settings": {"learning_rate": 1e-5, "dataset_path": ["<b>x</b>.jsonl"]}, "processes": 2}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    return tmp_path


def test_training_report_shows_curves_latest_metrics_and_settings(run):
    pytest.importorskip("matplotlib")
    html = training.write_training_report(run).read_text()
    page = Tags(html)
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == ["Loss", "Accuracy", "Learning rate", "Gradient norm before clipping", "Throughput"]
    assert "held-out" in page.text and "<b>x</b>.jsonl" in page.text and "2 processes" in page.text
    assert html == training.write_training_report(run).read_text()  # deterministic, byte for byte


def test_each_held_out_set_has_its_curve():
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "eval_loss": 0.6, "eval_calm_loss": 0.5, "eval_odd_loss": 0.7}]
    run = {"data": {"held_out": {"sets": {"calm": {"kept": 3}, "odd": {"kept": 2}}}}}
    run["best_evaluation"] = {"step": 1}
    page = Tags(training.training_page(training.Run("run", lines, run)))
    assert all(label in page.text for label in ("held-out", "calm", "odd", "step 1, the best evaluation"))


def test_all_that_is_logged_is_drawn_and_the_best_step_is_marked(monkeypatch):
    drawn = {}
    monkeypatch.setattr(training.figures, "curves", lambda title, _, lines: drawn.setdefault(title, lines) and "")
    lines = [{"step": s, "epoch": 1.0, "loss": 0.7, "mine": s, "eval_loss": 0.6, "eval_x_loss": 0.5} for s in (1, 2)]
    lines += [{"step": 2, "eval_mine": 3, "eval_accuracy": 0.5, "eval_accuracy_ci95_low": 0.4}]
    description = {"data": {"held_out": {"sets": {"x": {}}}}, "best_evaluation": {"step": 2}}
    training.training_page(training.Run("run", lines, description))
    assert list(drawn) == ["Loss", "Accuracy", "mine"]
    marked = {name: curve.marked for name, curve in drawn["Loss"].items()}
    assert marked == {"training": None, "held-out": 2, "held-out: x": 2}
    assert drawn["mine"]["training"].values == [1, 2] and drawn["mine"]["held-out"].values == [3]


def test_sets_that_begin_alike_or_as_a_metric_does_are_told_apart(monkeypatch):
    drawn = {}
    monkeypatch.setattr(training.figures, "curves", lambda title, _, lines: drawn.setdefault(title, lines) and "")
    sets = ["a", "a_b", "reward", "accuracy", "training", "held-out"]
    line = {"loss": 0.7, "accuracy": 0.5, "accuracy_ci95_low": 0.4, "reward_chosen": 1.0}
    names = ["", "eval_", *(f"eval_{name}_" for name in sets)]
    lines = [{"step": 1} | {prefix + metric: value} for prefix in names for metric, value in line.items()]
    training.training_page(training.Run("run", lines, {"data": {"held_out": {"sets": {name: {} for name in sets}}}}))
    assert list(drawn) == ["Loss", "Accuracy", "Reward of chosen replies"]
    labels = ["training", "held-out", *(f"held-out: {name}" for name in sets)]
    assert all(list(curves) == labels for curves in drawn.values())


def test_several_runs_are_drawn_side_by_side(run, tmp_path_factory):
    pytest.importorskip("matplotlib")
    other = tmp_path_factory.mktemp("other")
    (other / "metrics.jsonl").write_text('{"step": 3, "loss": 0.125, "eval_loss": 0.25}\n')
    (other / "run.json").write_text('{"settings": {"learning_rate": 2e-05, "dataset_path": ["<b>x</b>.jsonl"]}}')
    done = commands.run("rm.report", run, other)
    assert done.returncode == 0 and done.stdout == f"{run / 'comparison.html'}\n"
    page = Tags((run / "comparison.html").read_text())
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == ["Loss", "Accuracy", "Learning rate", "Gradient norm before clipping", "Throughput"]
    assert f"{other.name}, held-out" in page.text and "0.1250" in page.text and "2e-05" in page.text
    assert "<b>x</b>" not in page.text  # a setting that they share


def test_curve_has_the_later_value_of_a_step_repeated_after_a_resume():
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"step": 4, "loss": 1.0}, {"step": 6, "other": 1}]
    run = training.Run("run", lines, {})
    assert run.points("loss") == ([2, 4], [3.0, 1.0]) and run.points("accuracy") == ([], [])


def hide_matplotlib(monkeypatch):
    """Make every import of matplotlib fail."""
    original_import = builtins.__import__

    def import_without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_matplotlib)


def test_training_report_without_matplotlib_says_how_to_install_it(run, monkeypatch):
    hide_matplotlib(monkeypatch)
    page = training.write_training_report(run).read_text()
    assert "pip install matplotlib" in page and "<svg" not in page and "grad_norm" in page


def test_write_report_reports_an_error_without_raising_it(run, capsys):
    (run / "run.json").write_text("{broken")
    with dist.session(0):
        training.write_report(run)
    assert "report.html was not written" in "".join(capsys.readouterr())
    assert not (run / "report.html").exists()


def test_the_name_of_a_metric_is_text(run):
    pytest.importorskip("matplotlib")
    name = '"><script>$alert_{1$\x1b[2J'
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, name: 1.0}) + "\n")
    page = Tags(training.write_training_report(run).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    (figure,) = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert figure == name.replace("\x1b", r"\x1b")


def test_a_null_in_run_json_is_an_absent_key(run, monkeypatch):
    monkeypatch.setattr(training.html, "figures", lambda *_: "")
    description = {"settings": None, "processes": 2, "best_evaluation": None, "data": {"held_out": {"sets": None}}}
    pages = []
    for content in (description, description | {"data": {"held_out": None}}, {"processes": 2, "data": None}):
        (run / "run.json").write_text(json.dumps(content))
        pages.append(training.write_training_report(run).read_text())
    assert pages[0] == pages[1] == pages[2]


def test_report_command_fails_for_a_folder_without_metrics(tmp_path):
    done = commands.run("rm.report", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds no metrics" in done.stderr


def test_report_command_without_a_folder_prints_its_usage():
    for arguments in ([], ["--help"]):
        done = commands.run("rm.report", *arguments)
        assert done.returncode == 1 and "python -m rm.report runs/rm" in done.stderr


def test_a_report_that_is_missing_is_written_and_another_is_left_alone(run, monkeypatch):
    monkeypatch.setattr(training, "training_page", lambda *_: "page")
    monkeypatch.setattr(dist, "barrier", lambda: None)
    training.write_report(run, if_missing=True)
    assert (run / "report.html").read_text() == "page"
    (run / "report.html").write_text("another")
    (run / "model").mkdir()
    (run / "model" / "scoring.json").write_text("{}")
    monkeypatch.setattr(training.model_card, "of_training", lambda *_: "card")
    training.write_report(run, if_missing=True)
    assert (run / "report.html").read_text() == "another" and (run / "model" / "README.md").read_text() == "card"
