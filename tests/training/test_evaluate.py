"""rm.training.evaluate: means over named sets and over all of them, against transformers' own forward."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_rm
import train_sft
from rm.evaluation.stats import wilson_interval
from rm.training import evaluate
from tests.ranks import run_ranks
from tests.runs import TEXTS, main, outcome, settings, world

SETS = {"many": slice(0, 20), "few": slice(20, 27)}


def with_sets(out, script, **changes):
    """Settings of a run that is evaluated on two sets; one of them has two files."""
    paths = []
    data = json.loads((world() / ("texts.json" if script is train_sft else "pairs.json")).read_text())
    for name, part in SETS.items():
        for number, records in enumerate((data[part][:4], data[part][4:])):
            file = out.parent / f"{name}{number}.json"
            file.write_text(json.dumps(records))
            paths.append(f"{name}={file}")
    return settings(out, script, eval_dataset_path=tuple(paths), validation_split_percentage=0.0, **changes)


def last_evaluation(config) -> dict:
    return next(line for line in reversed(outcome(config)[1]) if "eval_loss" in line)


def test_a_reward_model_is_evaluated_on_each_set_and_on_all_pairs(tmp_path):
    config = with_sets(tmp_path / "out", train_rm, num_train_epochs=1, learning_rate=1e-5, eval_on_start=True)
    run_ranks(1, main, config)
    lines = outcome(config)[1]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 4]

    folder = tmp_path / "out" / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def reward(text: str) -> float:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return model(torch.tensor([ids])).logits.item()

    with torch.no_grad():
        chosen = torch.tensor([reward(text) for text in TEXTS[:27]])
        rejected = torch.tensor([reward(text[:-3] + "no.") for text in TEXTS[:27]])
    line = last_evaluation(config)
    parts = {"": slice(0, 27)} | {f"{name}_": part for name, part in SETS.items()}
    for name, part in parts.items():
        right, n = (chosen > rejected)[part].sum().item(), len(chosen[part])
        assert line[f"eval_{name}accuracy"] == right / n
        low, high = wilson_interval(right / n, n)
        assert (line[f"eval_{name}accuracy_ci95_low"], line[f"eval_{name}accuracy_ci95_high"]) == (low, high)
        loss = torch.nn.functional.softplus(rejected - chosen)[part].mean().item()
        assert line[f"eval_{name}loss"] == pytest.approx(loss, abs=1e-5)
        assert line[f"eval_{name}reward_chosen"] == pytest.approx(chosen[part].mean().item(), abs=1e-5)
        assert line[f"eval_{name}reward_rejected"] == pytest.approx(rejected[part].mean().item(), abs=1e-5)


def test_a_language_model_is_evaluated_on_each_set_and_on_all_tokens(tmp_path, capfd):
    config = with_sets(tmp_path / "out", train_sft, num_train_epochs=1, eval_steps=None, learning_rate=1e-2)
    run_ranks(1, main, config)
    folder = tmp_path / "out" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    line, sums = last_evaluation(config), {}
    for name, part in SETS.items():
        total = torch.zeros(3, dtype=torch.float64)
        for text in TEXTS[part]:
            ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids = torch.tensor([ids])
            with torch.no_grad():
                output = model(ids, labels=ids)
            hits = (output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum()
            total += torch.tensor([output.loss.item() * (ids.shape[1] - 1), hits, ids.shape[1] - 1])
        sums[f"{name}_"] = total
    totals = {name: total.tolist() for name, total in (sums | {"": sum(sums.values())}).items()}
    for name, (loss, hits, count) in totals.items():
        assert line[f"eval_{name}loss"] == pytest.approx(loss / count, rel=1e-5)
        assert line[f"eval_{name}token_accuracy"] == pytest.approx(hits / count)
        assert line[f"eval_{name}perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    printed = capfd.readouterr().out
    assert "held out, many: 20 records" in printed and "step 4/4  few: loss " in printed


def test_eval_on_start_without_held_out_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--eval_on_start needs held-out data: give --eval_dataset_path"):
        settings(tmp_path / "out", validation_split_percentage=0.0, eval_on_start=True)


def test_an_infinite_perplexity_is_no_error():
    means = evaluate.means({"loss": 1e6, "token_accuracy": 0.0, "count": 2.0})
    assert math.isfinite(means["perplexity"]) and means["loss"] == 5e5
