"""Training on numbers that records give to replies, and what is made of such a model: whole runs of the scripts."""

import functools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train_rm
from rm.report import model_card
from rm.report.html import format_value
from rm.scoring.scorer import Scorer
from tests import commands, runs
from tests.ranks import run_ranks

NAMES = ("helpfulness", "verbosity")


def records():
    """Some with a prompt and a reply, some with messages; in every third one attribute is not known."""
    for n, text in enumerate(runs.TEXTS):
        _, prompt, reply = text.replace("###Human: ", "\n").replace("###Assistant: ", "\n").split("\n")
        attributes = {"helpfulness": n % 5, "verbosity": None if n % 3 == 0 else n % 4 / 2, "coherence": 4}
        if n % 2:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            yield {"messages": messages, "attributes": attributes}
        else:
            yield {"prompt": prompt, "response": reply} | attributes


@functools.cache
def data() -> str:
    file = runs.world() / "rated.jsonl"
    file.write_text("\n".join(map(json.dumps, records())))
    return str(file)


def settings(out, **changes):
    regression = dict(loss="regression", attributes=NAMES, dataset_path=(data(),), dialogue_format="hh")
    return runs.settings(out, **regression | {"bare_text": "dialogue"} | changes)


@functools.cache
def trained(**changes) -> Path:
    """The folder of a run."""
    out = Path(tempfile.mkdtemp(dir=runs.world())) / "out"
    run_ranks(1, runs.main, settings(out, **changes))
    return out


def evaluate(model: Path, out: Path, *flags, data=data) -> list[dict]:
    """The lines of scores.jsonl."""
    words = ("--model_name_or_path", model, "--dataset_path", data(), "--output_dir", out, *flags)
    done = commands.run("eval_rm.py", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in open(out / "scores.jsonl")]


def texts() -> list[str]:
    return [text + "<|endoftext|>" for text in runs.TEXTS]


@torch.no_grad()
def their_outputs(model, tokenizer) -> np.ndarray:
    return torch.stack([model(**tokenizer(t, return_tensors="pt")).logits[0] for t in texts()]).numpy()


def test_a_killed_run_resumes_bit_identically_and_two_ranks_train_as_one(tmp_path):
    config = settings(tmp_path / "out")
    with pytest.raises(RuntimeError):
        run_ranks(2, runs.main, config, runs.fault(train_rm, "train_step", 6))
    run_ranks(2, runs.main, config)
    whole = settings(tmp_path / "whole")
    run_ranks(2, runs.main, whole)
    runs.assert_same(runs.outcome(config), runs.outcome(whole))
    one = runs.outcome(settings(trained()))
    for name in ("loss", "grad_norm", "eval_loss", "eval_mse_verbosity", "eval_pearson_helpfulness"):
        two, expected = ([line[name] for line in lines if name in line] for lines in (runs.outcome(whole)[1], one[1]))
        assert len(two) >= 3 and two == pytest.approx(expected, rel=1e-3)


def test_an_evaluation_says_what_transformers_says_of_the_saved_model(tmp_path):
    folder = trained() / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    outputs = their_outputs(model, AutoTokenizer.from_pretrained(folder))
    lines = evaluate(folder, tmp_path / "out", "--attributes", "verbosity", "helpfulness")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    card = model_card.of_training(trained(), tmp_path / "out")
    mse = format_value(report["sets"]["rated"]["attributes"]["verbosity"]["mse"])
    for part in (
        "one number for each of `helpfulness`, `verbosity`",
        ".logits\n",
        f"| rated | verbosity | 20 | {mse} |",
    ):
        assert part in card
    given = [record.get("attributes", record) for record in records()]
    for column, name in enumerate(NAMES):
        scores = np.array([line["scores"][name] for line in lines])
        np.testing.assert_allclose(scores, outputs[:, column], rtol=1e-4, atol=1e-5)
        known = np.array([np.nan if one[name] is None else one[name] for one in given])
        has, of = ~np.isnan(known), report["sets"]["rated"]["attributes"][name]
        assert of["n"] == has.sum() and of["mse"] == pytest.approx(np.mean((scores - known)[has] ** 2), rel=1e-5)
        assert of["pearson"] == pytest.approx(np.corrcoef(scores[has], known[has])[0, 1], abs=1e-6)


@functools.cache
def pairs() -> str:
    file = runs.world() / "own_pairs.jsonl"
    lines = [{"prompt": "what is 1?", "chosen": text[-9:], "rejected": text[10:19]} for text in runs.TEXTS]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_one_output_or_a_weighted_sum_of_them_is_the_reward_in_every_form_of_the_model(tmp_path):
    run = trained(use_lora=True, lora_r=4, max_steps=4)
    scores = {}
    for name, model, *flags in (
        ("first", run / "model", "--reward_label", "helpfulness"),
        ("second", run / "model", "--reward_label", 1),
        ("sum", run / "model", "--reward_weights", 0.65, -0.4),
        ("of the adapter", run / "adapter", "--reward_weights", 0.65, -0.4),
        ("of a checkpoint", runs.checkpoints(settings(run))[-1], "--reward_weights", 0.65, -0.4),
    ):
        lines = evaluate(model, tmp_path / name, "--score_only", "true", *flags, data=pairs)
        scores[name] = np.array([line["scores"] for line in lines])
    expected = 0.65 * scores["first"] - 0.4 * scores["second"]
    assert np.ptp(expected) > 0.1
    for name in ("sum", "of the adapter", "of a checkpoint"):
        np.testing.assert_allclose(scores[name], expected, atol=1e-4)

    base = AutoModelForSequenceClassification.from_pretrained(runs.world() / "model", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    theirs = their_outputs(PeftModel.from_pretrained(base, run / "adapter").eval(), tokenizer)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    np.testing.assert_allclose(theirs, their_outputs(merged, tokenizer), atol=1e-4)


def test_exports_keep_all_outputs_or_the_one_that_is_named(tmp_path):
    run = trained(use_lora=True, lora_r=4, max_steps=4)
    whole = load_file(run / "model" / "model.safetensors")["score.weight"]
    for source, out, flags, rows, labels in (
        ("adapter", "all", (), slice(None), list(NAMES)),
        ("model", "one", ("--reward_label", "verbosity"), slice(1, 2), None),
    ):
        words = ("--model_name_or_path", run / source, "--output_dir", tmp_path / out, "--dtype", "float32", *flags)
        done = commands.run("rm.export", *words)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(load_file(tmp_path / out / "model.safetensors")["score.weight"], whole[rows])
        assert json.loads((tmp_path / out / "scoring.json").read_text())["labels"] == labels
    one, of_two = (
        Scorer(tmp_path / "one"),
        Scorer(run / "model", reward_label="verbosity"),
    )  # each verifies its contract
    assert one.score(runs.TEXTS[:3]) == pytest.approx(of_two.score(runs.TEXTS[:3]), abs=1e-5)


def test_mistakes_are_named(tmp_path):
    model = trained() / "model"
    for message, flags in {
        r"2 outputs \(helpfulness, verbosity\): name the one": (),
        "--reward_label honesty: the outputs of .* are called helpfulness, verbosity": ("--reward_label", "honesty"),
        "--reward_weights has 3 numbers": ("--reward_weights", 1, 2, 3),
        "--attributes honesty: the outputs of .* are helpfulness, verbosity": ("--attributes", "honesty"),
    }.items():
        words = ("--model_name_or_path", model, "--dataset_path", pairs(), "--output_dir", tmp_path / "out", *flags)
        done = commands.run("eval_rm.py", *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.search(message, done.stderr), done.stderr
    for message, changes in {
        "go together: give both": {"attributes": ()},
        "--label_smoothing is of losses that compare replies": {"label_smoothing": 0.1},
        "--group_by_prompt and --reward_set_path are of pairs": {"group_by_prompt": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            settings(tmp_path / "out", **changes)
