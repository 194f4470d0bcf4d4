"""rm.report.model_card: what the card says is in the run's files, and its lines of code give the rewards of Scorer."""

import json
import re
import sys
from unittest import mock

import pytest
import torch

from rm.evaluation.stats import wilson_interval
from rm.report import __main__ as command
from rm.report import model_card, training
from rm.scoring import Scorer
from tests import runs
from tests.ranks import run_ranks
from tests.reward_positions import dialogue, reward_folder
from tests.text_fixtures import byte_level

pytest.importorskip("transformers")
PRIME = dialogue("Is 7 prime?", "Yes.")
PLAIN = "###Human: Is 7 prime?###Assistant: Yes."


def code(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.S)


@pytest.mark.parametrize(
    ("kind", "text", "blocks"),
    [
        ("Qwen2.5 base", {}, ["dialogues", "texts"]),
        ("Qwen2.5 base", {"dialogue_format": "hh"}, ["dialogues"]),
        (None, {}, ["texts"]),
    ],
)
def test_the_lines_of_code_on_the_card_give_the_rewards_of_scorer(kind, text, blocks, tmp_path, monkeypatch):
    folder = reward_folder(kind or "Qwen2.5 base", byte_level, tmp_path, **text)
    if kind is None:  # no template
        without_template(folder)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"model_name_or_path": "runs/sft/model"}}))
    transformers, trl, vllm = code(model_card.of_training(tmp_path))
    monkeypatch.chdir(folder)
    scorer, expected = Scorer("."), {}
    if "dialogues" in blocks:
        (expected["dialogues"],) = scorer.score([PRIME])
    if "texts" in blocks:
        (expected["texts"],) = scorer.score([PLAIN])

    got = {}
    head, *each = re.split(r"\n(?=dialogues = |texts = )", transformers)
    names = {}
    exec(head, names)
    for block in each:
        exec(block, names)
        got[block.split()[0]] = names["rewards"].item()
    assert got == pytest.approx(expected, abs=1e-4) and list(got) == blocks

    names = {"GRPOTrainer": mock.Mock(), "policy": None, "arguments": None, "prompts": None}
    exec(trl, names)
    reward = names["GRPOTrainer"].call_args.kwargs["reward_funcs"]
    (computed,) = reward(prompts=["Is 7 prime?"], completions=["Yes."])
    assert computed == pytest.approx(scorer.score_responses(["Is 7 prime?"], [["Yes."]])[0][0], abs=1e-5)

    pytest.importorskip("requests"), pytest.importorskip("uvicorn")
    from rm.serve.app import App, Limits
    from tests.serve.server import serving

    with serving(App(scorer, "rm", Limits())) as url:
        names = {"EOS": "<|endoftext|>"}
        exec(vllm.replace("http://localhost:8000", url), names)
    assert names["reward"] == pytest.approx(expected[blocks[0]], abs=1e-4)


def without_template(folder) -> None:
    """Write the contract of a model that has no chat template."""
    from rm.data.dataset import TextSettings
    from rm.distributed import process_group as dist
    from rm.scoring import contract

    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with dist.session(0):
        contract.write(folder, TextSettings(max_length=300), torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with LoRA."""
    out = tmp_path_factory.mktemp("run") / "rm"
    config = runs.settings(out, num_train_epochs=1, use_lora=True, lora_r=4, save_steps=100)
    run_ranks(1, runs.main, config)
    training.write_model_card(out)
    return out


def test_a_card_says_data_recipe_and_held_out_accuracy_of_its_run(run):
    card = (run / "model" / "README.md").read_text()
    described = json.loads((run / "run.json").read_text())
    last = [json.loads(line) for line in open(run / "metrics.jsonl")][-1]
    kept = described["data"]["held_out"]["kept"]
    low, high = wilson_interval(last["eval_accuracy"], kept)
    assert (
        f"on {kept} held-out records: accuracy {last['eval_accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        in card
    )
    assert "- `pairs.json`: 30 records (30 positive/negative)\n- held out: 6 records of these" in card
    assert "| trained | LoRA, merged: rank 4, alpha 32.0, modules q_proj v_proj |" in card
    assert (
        "| learning rate | 0.001 |" in card and "| precision | float32 |" in card and "| loss | bradley_terry |" in card
    )
    assert "texts of more than 512 tokens were left out" in card and "5 probe texts" in card
    assert str(run.parent) not in card and str(runs.world()) not in card  # paths of this machine mean nothing elsewhere
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card


def test_the_numbers_of_an_evaluation_are_put_into_the_card(run, tmp_path, monkeypatch, capsys):
    one = {"n": 40, "accuracy": 0.75, "accuracy_ci95": [0.6, 0.86], "accuracy_ci95_clustered": [0.58, 0.9]}
    length = {"longest_accuracy": 0.5, "controlled_accuracy": 0.71}
    math = {"prompts": 7, "score": 0.25, "ci95_clustered": [0.1, 0.4]}
    benchmark = {"name": "RM-Bench", "sections": {"math": math}, "absent": []} | math | {"score": 0.5}
    sets = {"mine|own": one | {"length": length, "benchmark": benchmark}}
    report = {"settings": {"model_name_or_path": [str(run / "model")]}, "sets": sets}
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["rm.report", str(run), str(tmp_path)])
    monkeypatch.setattr(training, "write_training_report", lambda folder: "")  # whose figures take seconds
    command.main()
    assert str(run / "model" / "README.md") in capsys.readouterr().out
    card = (run / "model" / "README.md").read_text()
    assert "| mine\\|own | 40 | 0.7500 | 0.5800 to 0.9000 | 0.5000 | 0.7100 |" in card
    assert (
        "| mine\\|own (RM-Bench) | 7 | 0.5000 | 0.1000 to 0.4000 | 0.5000 | 0.7100 |\n| · math | 7 | 0.2500 |" in card
    )
    report["settings"]["model_name_or_path"] = ["runs/other/model"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"report.json is of runs/other/model, and not of .*model"):
        training.write_model_card(run, tmp_path)
    report = report | {"settings": {"model_name_or_path": [str(run / "model")]}, "sets": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="compares no replies"):
        training.write_model_card(run, tmp_path)


def test_a_base_from_the_hub_is_named_with_its_commit(run, tmp_path):
    described = json.loads((run / "run.json").read_text())
    path = "/cache/models--Qwen--Qwen3-0.6B-Base/snapshots/da87bfb608c14b7cf20ba1ce41287e8de496c0cd"
    described["settings"]["model_name_or_path"] = path
    (tmp_path / "run.json").write_text(json.dumps(described))
    card = model_card.of_training(tmp_path)
    assert "base_model: Qwen/Qwen3-0.6B-Base\n---" in card
    assert "[Qwen/Qwen3-0.6B-Base](https://huggingface.co/Qwen/Qwen3-0.6B-Base) (commit `da87bfb608c1`)" in card
