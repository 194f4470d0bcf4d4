"""rm.hf.checkpoint_folder: a checkpoint is taken wherever a model's folder is, and gives what training had."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval_rm
import train_rm
import train_sft
from rm import export
from rm.config import compose, updated
from rm.distributed import process_group as dist
from rm.hf import hub, saving, weights
from rm.report import html
from rm.scoring.scorer import Scorer
from tests import runs
from tests.ranks import run_ranks
from tests.runs import TEXTS, outcome

LORA = dict(use_lora=True, lora_r=4, lora_target_modules=("all-linear",))
PAIRS = [{"positive": text, "negative": text[:-3] + end} for text in TEXTS[:9] for end in ("no.", "i do not know.")]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(html, "figures", lambda *_: "")  # to draw them takes longer than all the rest


def config_of(out: Path, script=train_rm, **changes):
    """A run of 9 steps with a checkpoint and an evaluation after each three."""
    held_out = out.parent / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, PAIRS if script is train_rm else [{"text": t} for t in TEXTS[:4]])))
    values = dict(
        save_steps=3, save_total_limit=0, eval_dataset_path=(str(held_out),), validation_split_percentage=0.0,
        global_batch_size=10, learning_rate=5e-4,
    )  # fmt: skip
    return runs.settings(out, script, **values | changes)


def checkpoint_of(config, step: int = 3) -> Path:
    return Path(config.run.output_dir) / "checkpoints" / f"step_{step}"


def evaluated(model: Path, config, out: Path) -> dict:
    """report.json of an evaluation on the run's held-out pairs."""
    values = dict(
        model_name_or_path=(str(model),), dataset_path=config.split.eval_dataset_path, output_dir=str(out),
        cache_dir=str(out.parent / "cache"), max_tokens=200,
    )  # fmt: skip
    with dist.session(0):
        eval_rm.main(compose(eval_rm.Settings, **values))
    return json.loads((out / "report.json").read_text())


def exported(source: Path, out: Path) -> Path:
    with dist.session(0):
        values = dict(model_name_or_path=str(source), output_dir=str(out), dtype="float32")
        export.main(compose(export.Settings, **values))
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A finished SFT run with LoRA, with checkpoints."""
    config = config_of(tmp_path_factory.mktemp("sft") / "out", train_sft, **LORA)
    run_ranks(1, runs.main, config)
    return config


NEW_TOKENS = ("auto", *(f"<|new{i}|>" for i in range(150)))  # more than the embedding has spare rows
# how a run trains -> (its processes, its settings, the model in the SFT run's folder that it starts from)
TRAININGS = {
    "all weights": (2, {}, None),
    "LoRA on an adapter": (2, LORA, "adapter"),
    "LoRA on a checkpoint with LoRA": (1, LORA, "checkpoints/step_6"),
    "LoRA with new tokens": (1, LORA | dict(chat_template="chatml.jinja", add_special_tokens=NEW_TOKENS), None),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_checkpoint_scores_as_the_training_did_at_its_step(training, language_model, tmp_path, capfd):
    processes, changes, start = TRAININGS[training]
    changes = dict(changes)
    if start:
        changes["model_name_or_path"] = str(Path(language_model.run.output_dir) / start)
    if "chat_template" in changes:
        template = tmp_path / changes["chat_template"]
        template.write_text(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "utf-8"
        )
        changes["chat_template"] = str(template)
    config = config_of(tmp_path / "out", **changes)
    run_ranks(processes, runs.main, config)
    lines = {line["step"]: line for line in outcome(config)[1] if "eval_loss" in line}
    assert lines[3]["eval_loss"] != pytest.approx(lines[9]["eval_loss"], abs=1e-4)
    capfd.readouterr()
    report = evaluated(checkpoint_of(config), config, tmp_path / "eval")
    assert report["loss"] == pytest.approx(lines[3]["eval_loss"], abs=1e-6)
    assert report["margin_mean"] == pytest.approx(lines[3]["eval_margin"], abs=2e-6)
    assert report["accuracy"] == pytest.approx(lines[3]["eval_accuracy"])
    for interval in ("accuracy_ci95", "accuracy_ci95_clustered"):
        assert report[interval] == [lines[3][f"eval_{interval}_{end}"] for end in ("low", "high")]
    assert "is a checkpoint: texts are written as in its training, and no golden" in capfd.readouterr().out

    # The model that transformers reads of an export, with golden scores of its own.
    folder = exported(checkpoint_of(config), tmp_path / "exported")
    assert json.loads((folder / "scoring.json").read_text())["step"] == 3
    assert Scorer(folder).contract.golden
    if "chat_template" not in changes:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [*tokenizer(TEXTS[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            reward = model(torch.tensor([ids])).logits.item()
        assert Scorer(checkpoint_of(config)).score(TEXTS[:1])[0] == pytest.approx(reward, abs=1e-5)


def test_a_language_models_checkpoint_is_what_training_of_a_reward_model_starts_from(language_model, tmp_path):
    """As from the model that is exported from it."""
    checkpoint = checkpoint_of(language_model)
    folder = exported(checkpoint, tmp_path / "exported")
    assert weights.fingerprint(checkpoint) != weights.fingerprint(folder)
    one = config_of(tmp_path / "one", model_name_or_path=str(checkpoint), num_train_epochs=1)
    run_ranks(1, runs.main, one)
    other = updated(one, model_name_or_path=str(folder), output_dir=str(tmp_path / "other"))
    run_ranks(1, runs.main, other)
    runs.assert_same(outcome(one), outcome(other))
    with pytest.raises(ValueError, match="is not a reward model"):
        evaluated(checkpoint, one, tmp_path / "eval")


def test_a_run_stands_for_its_model(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(dist, "say", said.append)
    config = config_of(tmp_path / "out", num_train_epochs=1)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        run_ranks(1, runs.main, config, runs.fault(saving, "save", 1))
    with pytest.raises(ValueError, match="a run that has not finished; its newest checkpoint is .*/checkpoints/step_3"):
        hub.model(str(out))
    run_ranks(1, runs.main, config)
    assert Scorer(out).score(TEXTS[:2]) == Scorer(out / "model").score(TEXTS[:2])
    assert said == [f"{out} is a run: its model is {out / 'model'}"]
    with pytest.raises(ValueError, match="holds checkpoints: name one of them, such as .*step_3$"):
        hub.model(str(out / "checkpoints"))


def test_what_does_not_go_with_a_checkpoint_is_refused_in_a_line(language_model, tmp_path):
    checkpoint, base = checkpoint_of(language_model), Path(language_model.model.model_name_or_path)
    with pytest.raises(ValueError, match="exists and is not a model, so it is not replaced"):
        exported(base, checkpoint)
    described = base / "config.json"
    content = described.read_text()
    try:
        described.write_text(content + "\n")
        with pytest.raises(ValueError, match="holds adapters on .*, which has changed since: put the model back"):
            exported(checkpoint, tmp_path / "exported")
    finally:
        described.write_text(content)
    config = config_of(tmp_path / "out", model_name_or_path=str(checkpoint), add_special_tokens=("<|new|>",))
    with pytest.raises(RuntimeError, match="--add_special_tokens: .*step_3 is a checkpoint; write its model"):
        run_ranks(1, runs.main, config)
    (checkpoint_of(language_model, 9) / "config.json").unlink()  # as it was before checkpoints were models
    with pytest.raises(ValueError, match="is a checkpoint that an earlier version wrote"):
        hub.model(str(checkpoint_of(language_model, 9)))
