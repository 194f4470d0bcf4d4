"""rm.training.run_log: what a run writes, and that it stops at a loss or a gradient that is not finite."""

import json

import pytest
import torch

from rm.data.batch import StepBatches
from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist
from rm.training import run_log
from tests.ranks import run_ranks

BATCHES = StepBatches(micro_batches=[], num_examples=6, num_labels=0, num_tokens=100, seed=0)


def sums(loss: float, count: int) -> dict:
    values = {"loss": loss, "accuracy": count / 2, "margin": 0.25 * count, "count": float(count)}
    return {name: torch.tensor(value) for name, value in values.items()}


def run(tmp_path, losses, norms=None, **settings):
    """The lines of metrics of a run with these summed losses, and gradient norms of 1 or of `norms`."""
    norms = norms or [1.0] * len(losses)
    settings = run_log.RunSettings(output_dir=str(tmp_path / "run"), **settings)
    facts = {"data": {"a.jsonl": "hash"}}
    with run_log.RunLog(settings, settings, steps=len(losses), steps_per_epoch=4, facts=facts) as log:
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
            log.log_step(step, sums(loss, 2 + 2 * dist.rank()), torch.tensor(norm), 1e-3, BATCHES, "pairs")
            if log.evaluation_due(step):
                log.log_evaluation(step, {UNNAMED: {"loss": 0.5}})
    return [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]


def test_a_line_every_logging_steps_and_at_the_end_has_means_over_its_steps(tmp_path):
    lines = run_ranks(1, lambda: run(tmp_path, [2.0, 4.0, 6.0, 8.0, 10.0], logging_steps=2))[0]
    train = [line for line in lines if "loss" in line]
    assert [(line["step"], line["epoch"], line["loss"]) for line in train] == [
        (2, 0.5, 1.5),
        (4, 1.0, 3.5),
        (5, 1.25, 5.0),
    ]
    assert train[0].keys() >= {
        "accuracy",
        "margin",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "pairs_per_second",
    }
    assert (train[0]["accuracy"], train[0]["margin"]) == (0.5, 0.25)
    assert [line["step"] for line in lines if "eval_loss" in line] == [5]


def test_means_are_over_all_ranks_weighted_by_their_counts(tmp_path):
    # Rank 0 counts 2 and rank 1 counts 4 pairs a step, both with a summed loss of 3: a mean of means would be 1.125.
    lines = run_ranks(2, lambda: run(tmp_path, [3.0], logging_steps=1))[0]
    assert lines[0]["loss"] == 1.0 and lines[0]["grad_norm"] == 1.0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(RuntimeError, match="ValueError: step 2: the loss is nan.* stops without saving anything"):
        run_ranks(1, lambda: run(tmp_path, [2.0, float("nan"), 2.0, 2.0], logging_steps=4))


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    norms = [1.0, 1.0, float("inf"), 1.0]
    with pytest.raises(
        RuntimeError, match="ValueError: step 3: the loss is 1.0, the gradient norm inf; the update was"
    ):
        run_ranks(1, lambda: run(tmp_path, [2.0] * 4, norms, logging_steps=4))


def test_run_json_holds_the_settings_and_describes_the_run(tmp_path):
    run_ranks(1, lambda: run(tmp_path, [1.0], seed=7))
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["settings"]["seed"] == 7 and saved["data"] == {"a.jsonl": "hash"}
    assert saved["versions"].keys() >= {"python", "torch"} and "git_commit" in saved and saved["processes"] == 1


def test_an_output_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds another run .run.json.: name a new folder"):
        run_log.check_unused(str(tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


def test_the_utilization_of_devices_is_logged_where_it_is_known(tmp_path):
    def logged(mfu: float | None) -> tuple[dict, list[float]]:
        asked = []
        settings = run_log.RunSettings(output_dir=str(tmp_path / str(mfu)))
        utilization = lambda tokens_per_second: asked.append(tokens_per_second) or mfu  # noqa: E731
        with run_log.RunLog(settings, settings, 1, 1, facts={}, utilization=utilization) as log:
            log.log_step(1, sums(1.0, 2), torch.tensor(1.0), 1e-3, BATCHES, "pairs")
        return json.loads((tmp_path / str(mfu) / "metrics.jsonl").read_text()), asked

    line, (tokens_per_second,) = run_ranks(1, logged, 0.25)[0]
    assert line["mfu"] == 0.25 and line["tokens_per_second"] == pytest.approx(tokens_per_second, abs=0.01)
    assert "mfu" not in run_ranks(1, logged, None)[0][0]


def full_disk(log: run_log.RunLog, lasts: bool) -> None:
    """Let the next write to metrics.jsonl fail, or all of them."""
    real = log.metrics.flush

    def fail():
        log.metrics.flush = fail if lasts else real
        raise OSError(28, "No space left on device")

    log.metrics.flush = fail


def ends_on_a_full_disk(tmp_path, lasts: bool) -> list[dict]:
    settings = run_log.RunSettings(output_dir=str(tmp_path / "run"))
    with run_log.RunLog(settings, settings, steps=1, steps_per_epoch=1, facts={}) as log:
        log.log_step(1, sums(1.0, 2), torch.tensor(1.0), 1e-3, BATCHES, "pairs")
        full_disk(log, lasts)
        log.log_evaluation(1, {"": {"loss": 0.5}})
    return [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]


def test_the_last_line_is_written_at_the_end_or_the_run_fails_and_prints_it(tmp_path):
    (lines,) = run_ranks(1, lambda: ends_on_a_full_disk(tmp_path, lasts=False))
    assert [line.get("eval_loss") for line in lines] == [None, 0.5]
    with pytest.raises(RuntimeError, match=r'(?s)OSError: .*No space left.*not in .*metrics.jsonl:.*"eval_loss": 0.5'):
        run_ranks(1, lambda: ends_on_a_full_disk(tmp_path / "again", lasts=True))


def test_what_a_finished_run_lacks_is_written(tmp_path):
    run_ranks(1, lambda: run(tmp_path, [1.0, 2.0]))
    folder = tmp_path / "run"
    table = (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").unlink()
    (folder / "exit.json").write_text("")
    run_log.complete(folder)
    assert (folder / "metrics.csv").read_bytes() == table
    assert json.loads((folder / "exit.json").read_text())["status"] == "finished"
