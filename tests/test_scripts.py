"""The three scripts as a user runs them: command lines and files; and the one-line error for each kind of mistake.

The processes are forked (`commands`), but for one run of each script and for what torchrun does to a mistake.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rm.scoring.scorer import Scorer
from tests import commands, text_fixtures, tiny

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
in_two_processes = functools.partial(commands.run, processes=2)
TEXTS = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(6) for b in range(5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny LLaMA, texts and pairs."""
    folder = tmp_path_factory.mktemp("world")
    text_fixtures.byte_level(folder / "model")
    tiny.llama(vocab_size=400).save_pretrained(folder / "model")
    (folder / "sft.json").write_text(json.dumps({"type": "text_only", "instances": [{"text": text} for text in TEXTS]}))
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in TEXTS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def python(*words) -> subprocess.CompletedProcess:
    """A `python` of its own, in place of `commands.run`."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def train(script: str, world: Path, out: Path, *flags, run=commands.run) -> list[dict]:
    data = world / ("sft.json" if script == "train_sft.py" else "pairs.jsonl")
    done = run(
        script, "--model_name_or_path", world / "model", "--dataset_path", data, "--output_dir", out,
        "--validation_split_percentage", 20, "--global_batch_size", 8, "--max_tokens", 200, "--logging_steps", 1,
        "--learning_rate", 1e-3, *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("example (record ") == 1  # of rank 0
    return metrics(out)


def values(lines: list[dict], *names: str) -> list[float]:
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.parametrize("script", ["train_sft.py", "train_rm.py"])
def test_two_processes_train_as_one_does(script, world, tmp_path):
    one = train(script, world, tmp_path / "one")
    two = train(script, world, tmp_path / "two", run=in_two_processes)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 3]
    names = ("loss", "grad_norm", "eval_loss")
    assert values(two, *names) == pytest.approx(values(one, *names), rel=1e-4)
    assert len(values(one, *names)) == 7
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def test_sft_then_reward_model_then_evaluation_and_scores_of_transformers(world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    train("train_sft.py", world, tmp_path / "sft", run=python)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    train("train_rm.py", world, tmp_path / "rm", "--model_name_or_path", tmp_path / "sft" / "model", run=python)
    flags = ("--model_name_or_path", tmp_path / "rm" / "model", "--dataset_path", world / "pairs.jsonl")
    for name, run in (("one", python), ("two", in_two_processes)):
        done = run("eval_rm.py", *flags, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr

    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["n"] == len(TEXTS) and report["accuracy_ci95"][0] <= report["accuracy"] <= report["accuracy_ci95"][1]
    scores = {}
    for name in ("one", "two"):
        lines = [json.loads(line) for line in open(tmp_path / name / "scores.jsonl")]
        assert [line["record"] for line in lines] == list(range(1, len(TEXTS) + 1))
        scores[name] = torch.tensor([line["scores"] for line in lines])
    torch.testing.assert_close(scores["two"], scores["one"], rtol=1e-5, atol=1e-5)
    accuracy = (scores["one"][:, 0] > scores["one"][:, 1]).double().mean().item()
    assert report["accuracy"] == pytest.approx(accuracy)

    hf_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm" / "model")
    records = [json.loads(line) for line in open(world / "pairs.jsonl")][:4]
    texts = [record[side] + tokenizer.eos_token for record in records for side in ("positive", "negative")]
    with torch.no_grad():
        logits = hf_model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    torch.testing.assert_close(scores["one"][:4].flatten(), logits, rtol=1e-4, atol=1e-4)


def test_a_merged_model_and_its_adapter_have_one_contract_which_is_checked(world, tmp_path):
    flags = ("--use_lora", "true", "--max_steps", 2, "--max_length", 150, "--validation_split_by", "order")
    train("train_rm.py", world, tmp_path / "rm", *flags, run=in_two_processes)
    forms = {form: tmp_path / "rm" / form for form in ("model", "adapter")}
    contracts = {form: json.loads((folder / "scoring.json").read_text()) for form, folder in forms.items()}
    scores = {form: torch.tensor([golden["score"] for golden in contracts[form]["golden"]]) for form in forms}
    torch.testing.assert_close(scores["model"], scores["adapter"], rtol=1e-4, atol=1e-4)
    contract = contracts["model"]
    assert contract["max_length"] == 150 and contract["reward_set"] == "6 examples held out"

    scorers = [Scorer(folder) for folder in forms.values()]  # each verifies its contract
    assert scorers[0].score(TEXTS[:3]) == pytest.approx(scorers[1].score(TEXTS[:3]), abs=1e-4)
    held_out = Scorer(forms["model"]).score(TEXTS[-6:], normalized=True)
    assert np.mean(held_out) == pytest.approx(0, abs=1e-3) and np.std(held_out) == pytest.approx(1, abs=1e-3)

    many = {"prompt": "###Human: 1?###Assistant:", "responses": [" one", " a long one", " 1"]}
    prompts = [many, {"prompt": "a", "responses": ["b"]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    flags = ("--model_name_or_path", forms["model"], "--dataset_path", tmp_path / "prompts.jsonl")
    flags += ("--score_only", "true", "--best_of_n", "true", "--output_dir", tmp_path / "scored")
    done = commands.run("eval_rm.py", *flags)
    assert done.returncode == 0, done.stderr
    lines, best = ([json.loads(line) for line in open(tmp_path / "scored" / f"{n}.jsonl")] for n in ("scores", "best"))
    expected = scorers[0].score_responses([p["prompt"] for p in prompts], [p["responses"] for p in prompts])
    assert [line["scores"] for line in lines] == [pytest.approx(rewards, abs=1e-5) for rewards in expected]
    assert [line["best"] for line in best] == [int(np.argmax(rewards)) for rewards in expected]
    assert best[1]["response"] == "b" and best[1]["score"] == lines[1]["scores"][0]

    contract["golden"][1]["score"] += 1
    (forms["model"] / "scoring.json").write_text(json.dumps(contract))
    flags = ("--model_name_or_path", forms["model"], "--dataset_path", world / "pairs.jsonl")
    assert "scoring.json has changed since it was written" in refused("eval_rm.py", tmp_path / "out", *flags)
    (forms["model"] / "SHA256SUMS").unlink()
    assert "probe text 2" in refused("eval_rm.py", tmp_path / "out", *flags)


def test_a_run_is_repeated_from_its_run_json(world, tmp_path):
    first = train("train_rm.py", world, tmp_path / "first", "--max_steps", 2)
    done = commands.run("train_rm.py", "--config", tmp_path / "first" / "run.json", "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert values(metrics(tmp_path / "again"), "loss", "grad_norm") == values(first, "loss", "grad_norm")


def refused(script: str, out: Path, *flags, run=commands.run) -> str:
    """The one-line error on stderr of a run that a user's mistake ended; asserts that nothing was written."""
    before = sorted(out.rglob("*")) if out.exists() else None
    done = run(script, *flags, "--output_dir", out)
    assert done.returncode != 0 and (sorted(out.rglob("*")) if out.exists() else None) == before
    line, *again = [line for line in done.stderr.splitlines() if line.startswith(("error", script + ": error"))]
    if run is commands.run:
        assert done.returncode == 2 and "Traceback" not in done.stderr and not again
    else:
        assert again == [line] and done.stderr.splitlines()[-1] == line  # below what torchrun prints
    return line


def model_with(folder: Path, world: Path, **config) -> Path:
    """A copy of the model with other settings in config.json."""
    folder.mkdir()
    for file in (world / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | config))
    return folder


MISTAKES = {
    "a missing file": ({"data": None}, "nowhere.jsonl: no such file"),
    "an empty file": ({"data": ""}, "the file is empty"),
    "broken JSON": ({"data": '{"chosen": "a", "rejected": "b"}\n{"chosen"'}, "line 2 column 10: is not JSON"),
    "a record without its keys": (
        {"data": '{"instances": [{"text": "a"}]}'},
        "record 1: has the keys 'text': it is a record of text_only, for train_sft.py",
    ),
    "no list": ({"data": '{"instances": 3}'}, "holds no records, but 3"),
    "a wrong type": ({"data": '{"chosen": "a", "rejected": 7}'}, "line 1: 'rejected' is 7; expected a string"),
    "no pair left": (
        {"flags": ["--max_length", 2]},
        "30 longer than --max_length 2; no example is left: raise --max_length",
    ),
    "an unknown flag": (
        {"flags": ["--lerning_rate", 1]},
        "unknown flag --lerning_rate: did you mean --learning_rate? All flags: --help",
    ),
    "an unknown architecture": ({"config": {"model_type": "mamba"}}, "model_type 'mamba' is not supported, only"),
    "missing tensors": ({"config": {"num_hidden_layers": 9}}, "missing: model.layers."),
    "extra tensors": ({"config": {"num_hidden_layers": 1}}, "unknown: model.layers.1."),
    "mis-shaped tensors": ({"config": {"intermediate_size": 99}}, "of another shape: model.layers.0.mlp."),
    "micro-batches smaller than a pair": (
        {"flags": ["--max_tokens", 5]},
        "--max_tokens 5 is less than the longest example's",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_one_line_that_says_what_to_do_and_writes_nothing(world, tmp_path, mistake, message):
    model, data = world / "model", world / "pairs.jsonl"
    if "config" in mistake:
        model = model_with(tmp_path / "model", world, **mistake["config"])
    if "data" in mistake:
        data = tmp_path / "nowhere.jsonl"
        if mistake["data"] is not None:
            data.write_text(mistake["data"])
    flags = mistake.get("flags", [])
    line = refused("train_rm.py", tmp_path / "out", "--model_name_or_path", model, "--dataset_path", data, *flags)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_mistake_under_torchrun_is_one_line_and_the_last_one(world, tmp_path):
    line = refused(
        "train_rm.py", tmp_path / "out", "--model_name_or_path", world / "model", "--dataset_path", "nowhere.jsonl",
        run=functools.partial(python, *TORCHRUN),
    )  # fmt: skip
    assert "nowhere.jsonl: no such file" in line


def test_an_output_folder_that_holds_another_run_stays_unchanged(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    flags = ("--model_name_or_path", world / "model", "--dataset_path", world / "pairs.jsonl")
    assert "already holds another run" in refused("train_rm.py", tmp_path / "out", *flags)


def test_evaluating_a_language_model_is_an_error_that_says_so(world, tmp_path):
    flags = ("--model_name_or_path", world / "model", "--dataset_path", world / "pairs.jsonl")
    assert "is not a reward model: it holds no score.weight" in refused("eval_rm.py", tmp_path / "out", *flags)
