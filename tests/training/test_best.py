"""rm.training.best: the best evaluation and early stopping are those of transformers; the best checkpoint survives."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState

import train_rm
import train_sft
from rm.data.sets import UNNAMED
from rm.distributed import checkpoint
from rm.hf import saving
from rm.report import model_card
from rm.scoring.scorer import Scorer
from rm.training import checkpointer, run_log
from rm.training.best import Best, BestSettings
from tests import runs
from tests.ranks import run_ranks
from tests.runs import TEXTS, at_call, die, exit_marker, fault, outcome, steps_saved

values = st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, float("nan"), float("inf")]), min_size=1, max_size=12)


@given(values, st.sampled_from(["loss", "eval_loss", "accuracy"]), st.integers(1, 3), st.sampled_from([0.0, 0.06]))
@settings(max_examples=200)
def test_best_and_early_stopping_are_those_of_transformers(losses, metric, patience, threshold):
    ours = Best(BestSettings(
        metric_for_best_model=metric, early_stopping_patience=patience, early_stopping_threshold=threshold,
    ))  # fmt: skip
    callback = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(
        metric_for_best_model=metric, greater_is_better=not metric.endswith("loss"), save_strategy="steps"
    )
    trainer = SimpleNamespace(args=args, state=TrainerState())
    name = f"eval_{metric.removeprefix('eval_')}"
    if metric == "accuracy":
        losses = [value for value in losses if value != float("inf")]
    for step, value in enumerate(losses, start=1):
        trainer.state.global_step, control = step, TrainerControl()
        callback.on_evaluate(args, trainer.state, control, {name: value})
        Trainer._determine_best_metric(trainer, {name: value}, None)
        ours.take(step, {name: value})
        restored = Best(ours.settings, None, json.loads(json.dumps(ours.state)))
        restored.take(step, {name: 0.0})  # an evaluation counts once
        for one in (ours, restored):
            assert one.step == trainer.state.best_global_step
            assert one.value in (trainer.state.best_metric, None)
            assert one.patience_counter == callback.early_stopping_patience_counter
            assert one.stops == control.should_training_stop


def test_what_is_not_finite_is_never_the_best():
    """For an accuracy, too, which a damaged line of metrics may have."""
    best = Best(BestSettings(metric_for_best_model="accuracy", early_stopping_patience=2))
    for step, value in enumerate((float("inf"), 0.5, float("inf"), 0.4), start=1):
        best.take(step, {"eval_accuracy": value})
    assert (best.step, best.value, best.stops) == (2, 0.5, True)


def test_a_perplexity_is_better_when_it_is_lower():
    assert BestSettings(metric_for_best_model="perplexity").lower_is_better
    assert not BestSettings(metric_for_best_model="eval_token_accuracy").lower_is_better


def test_a_run_without_a_finite_evaluation_says_so():
    never = Best(BestSettings())
    never.take(1, {"eval_loss": float("nan")})
    assert str(never) == "none: no eval_loss was finite"


def test_evaluations_of_other_data_do_not_count():
    before = Best(BestSettings(), {"all": "a"})
    before.take(3, {"eval_loss": 0.5})
    of_same, of_other = (Best(BestSettings(), {"all": data}, before.state) for data in "ab")
    assert (of_same.step, of_same.is_restored) == (3, True) and (of_other.step, of_other.is_restored) == (None, False)


# The loss of the evaluation after each step: best after step 3, of which no checkpoint is due.
LOSSES = {1: 0.6, 2: 0.5, 3: 0.4, 4: 0.45, 5: 0.41, 6: 0.3, 7: 0.2, 8: 0.1, 9: 0.05}
SELECT = dict(
    eval_steps=1, save_steps=2, save_total_limit=1, load_best_model_at_end=True, early_stopping_patience=2,
)  # fmt: skip


def config_of(out: Path, script=train_rm, **changes):
    return runs.settings(out, script, **SELECT | changes)


def main(config, inject=lambda: None) -> None:
    """A run whose evaluations have the losses above."""
    log = run_log.RunLog.log_evaluation

    def log_evaluation(self, step, means):
        means[UNNAMED]["loss"] = LOSSES[step]
        log(self, step, means)

    run_log.RunLog.log_evaluation = log_evaluation  # in this forked process only
    runs.main(config, inject)


def frozen_after(step: int, script=train_rm):
    """A fault: later steps do not change the weights."""

    def inject() -> None:
        train_step = script.train_step

        def stepped(model, optimizer, batches, max_grad_norm):
            stepped.calls += 1
            if stepped.calls > step:
                optimizer.step = lambda: None
            return train_step(model, optimizer, batches, max_grad_norm)

        stepped.calls = 0
        script.train_step = stepped

    return inject


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("run") / "out")
    run_ranks(1, main, config)
    return config


def test_a_run_stops_early_and_leaves_the_model_of_the_best_step(undisturbed, tmp_path):
    out = Path(undisturbed.run.output_dir)
    lines = outcome(undisturbed)[1]
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2, 3, 4, 5]
    assert exit_marker(undisturbed)["reason"] == "stopped early: eval_loss was best at step 3"
    assert steps_saved(undisturbed) == [3, 5]  # the best, and the newest
    run = json.loads((out / "run.json").read_text())
    assert run["model_step"] == 3
    assert run["best_evaluation"] == {"metric": "eval_loss", "step": 3, "value": 0.4}
    assert json.loads((out / "model" / "scoring.json").read_text())["step"] == 3
    assert "After 3 steps, the best, on 6 held-out records: accuracy" in model_card.of_training(out)

    plain = config_of(tmp_path / "out", load_best_model_at_end=False, early_stopping_patience=None)
    run_ranks(1, main, plain, frozen_after(3))
    assert exit_marker(plain)["step"] == 9
    assert all(torch.equal(outcome(plain)[0][name], values) for name, values in outcome(undisturbed)[0].items())


# when a run is killed -> (the owner and name of a function, the call at which it is killed)
PHASES = {
    "in a step after the best": (train_rm, "train_step", 5),
    "between the best evaluation and its checkpoint": (checkpointer.Checkpointer, "after_evaluation", 3),
    "before the best checkpoint is renamed": (checkpoint.os, "rename", 3),
    "in the evaluation that stops the run": (run_log.RunLog, "log_evaluation", 5),
    "when the best is loaded": (checkpoint, "load", 1),
    "in the export": (saving, "save", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_any_moment_stops_at_the_same_step_with_the_same_best(phase, undisturbed, tmp_path):
    config = config_of(tmp_path / "out")
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(1, main, config, fault(*PHASES[phase]))
    assert not (tmp_path / "out" / "model").exists()

    def no_step() -> None:
        train_rm.train_step = die

    run_ranks(1, main, config, no_step if phase in ("when the best is loaded", "in the export") else lambda: None)
    runs.assert_same(outcome(config), outcome(undisturbed))
    assert exit_marker(config)["reason"] == exit_marker(undisturbed)["reason"]
    assert 3 in steps_saved(config)


def test_nothing_is_decided_by_a_line_of_metrics_that_no_checkpoint_knows(tmp_path):
    config = config_of(tmp_path / "out", save_steps=9, early_stopping_patience=None)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(1, main, config, fault(saving, "save", 1))
    metrics = tmp_path / "out" / "metrics.jsonl"
    lines = metrics.read_text()
    metrics.write_text(lines.replace('"eval_loss": 0.05', '"eval_loss": 5.05'))
    assert metrics.read_text() != lines
    run_ranks(1, main, config)
    best = json.loads((tmp_path / "out" / "run.json").read_text())["best_evaluation"]
    assert best == {"metric": "eval_loss", "step": 9, "value": 0.05} and metrics.read_text() == lines


def test_two_processes_with_adapters_resume_with_the_same_best(tmp_path):
    lora = dict(use_lora=True, lora_dropout=0.1, script=train_sft)
    whole, broken = config_of(tmp_path / "whole", **lora), config_of(tmp_path / "broken", **lora)
    run_ranks(2, main, whole)
    with pytest.raises(RuntimeError):
        run_ranks(2, main, broken, fault(checkpoint, "load", 1, rank=1))
    run_ranks(2, main, broken)
    runs.assert_same(outcome(broken), outcome(whole))
    assert json.loads((tmp_path / "broken" / "run.json").read_text())["model_step"] == 3


def test_the_checkpoint_of_the_best_step_has_to_be_written_and_readable(undisturbed, tmp_path):
    config = config_of(tmp_path / "out")

    def full_disk() -> None:
        def fail():
            raise OSError(28, "No space left on device")

        checkpoint.save_file = at_call(3, fail, checkpoint.save_file)

    with pytest.raises(RuntimeError, match="best checkpoint so far, of step 3 .* same command resumes from step 2"):
        run_ranks(1, main, config, full_disk)
    run_ranks(1, main, config)
    runs.assert_same(outcome(config), outcome(undisturbed))

    for folder in ("model", "checkpoints/step_3"):
        shutil.rmtree(tmp_path / "out" / folder)
    with pytest.raises(RuntimeError, match="the best checkpoint cannot be loaded .*step_3 has no COMPLETE.*: delete"):
        run_ranks(1, main, config)


def test_without_the_flag_the_last_line_says_which_evaluation_was_best(tmp_path, capfd):
    config = config_of(tmp_path / "out", load_best_model_at_end=False, save_total_limit=2, save_steps=3)
    run_ranks(1, main, config)
    printed = capfd.readouterr().out
    checkpoint_and_model = f"{tmp_path}/out/checkpoints/step_3 --output_dir {tmp_path}/out/model_step_3"
    assert f"to get the best: python -m rm.export --model_name_or_path {checkpoint_and_model}\n" in printed
    assert "step 4/9  eval_loss 0.45" in printed and "step 4/9  best so far: step 3 with eval_loss 0.4\n" in printed
    assert "stopping early at step 5 of 9; the best evaluation was step 3 with eval_loss 0.4" in printed
    assert "the best evaluation was step 3 with eval_loss 0.4, and the model is that of step 5; to get" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_step"] == 5


def test_the_saved_model_is_that_of_the_best_evaluation_in_metrics_jsonl(tmp_path):
    """With evaluations as they are: the held-out pairs are the opposite of what is trained on, and get worse."""
    texts = TEXTS[:6]
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps([{"positive": text[:-3] + "no.", "negative": text} for text in texts]))
    data = dict(eval_dataset_path=(str(file),), validation_split_percentage=0.0)
    config = config_of(tmp_path / "out", early_stopping_patience=None, metric_for_best_model="accuracy", **data)
    run_ranks(1, runs.main, config)
    lines = [line for line in outcome(config)[1] if "eval_loss" in line]
    best_line = max(lines, key=lambda line: line["eval_accuracy"])
    assert best_line["step"] < 9
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_step"] == best_line["step"]
    scorer = Scorer(tmp_path / "out" / "model")
    margins = torch.tensor(scorer.score([text[:-3] + "no." for text in texts])) - torch.tensor(scorer.score(texts))
    assert torch.nn.functional.softplus(-margins).mean().item() == pytest.approx(best_line["eval_loss"], rel=1e-5)


def test_settings_that_would_have_no_effect_are_refused(tmp_path):
    for changes, message in {
        ("eval_steps", None): "--load_best_model_at_end compares evaluations, and there is only one",
        ("validation_split_percentage", 0.0): "--load_best_model_at_end needs held-out data",
        ("early_stopping_threshold", -1.0): "--early_stopping_threshold must not be negative",
        ("early_stopping_patience", 0): "--early_stopping_patience must be positive",
    }.items():
        with pytest.raises(ValueError, match=message):
            config_of(tmp_path, **dict([changes]))
    with pytest.raises(ValueError, match="has no effect without --early_stopping_patience"):
        config_of(tmp_path, early_stopping_patience=None, early_stopping_threshold=0.1)
    with pytest.raises(RuntimeError, match="--metric_for_best_model acc must be one of eval_loss, eval_accuracy"):
        run_ranks(1, main, config_of(tmp_path / "out", metric_for_best_model="acc"))
