"""python -m rm.export: other software loads what it writes as the model that was exported."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from rm import export
from rm.config import compose, parse
from rm.distributed import lease
from rm.distributed import process_group as dist
from rm.scoring import Scorer, contract
from tests import commands, similar_models, text_fixtures, tiny
from tests.ranks import run_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TEXTS = ["###Human: hi###Assistant: hello", "###Human: hi###Assistant: go away, please", "a"]


@pytest.fixture
def adapter(tmp_path):
    """A reward model as peft saves it: a base, an adapter and a head, all random."""
    text_fixtures.byte_level(tmp_path / "base")
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
        model = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def run(source, out, *flags, processes: int = 1):
    argv = ["--model_name_or_path", str(source), "--output_dir", str(out), *map(str, flags)]
    run_ranks(processes, lambda: export.main(parse(export.Settings, "", argv)))
    return out


@torch.no_grad()
def scores(model, folder) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text + tokenizer.eos_token for text in TEXTS]
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[:, 0].float() for text in texts])


@pytest.mark.parametrize("processes", [1, 2])
def test_transformers_and_its_pipeline_give_the_reward_of_an_exported_adapter(adapter, tmp_path, processes):
    peft_model, folder = adapter
    out = run(folder, tmp_path / "out", "--dtype", "float32", processes=processes)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    expected = scores(peft_model, out)
    torch.testing.assert_close(scores(model, out), expected, rtol=1e-4, atol=1e-5)
    classify = transformers.pipeline("text-classification", model=str(out), dtype=torch.float32)
    texts = [text + classify.tokenizer.eos_token for text in TEXTS]
    padded = torch.tensor([line["score"] for line in classify(texts, batch_size=3)])
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)  # as one batch, and without a sigmoid


@torch.no_grad()
def test_the_classes_of_verl_and_trl_give_the_reward_of_an_exported_adapter(adapter, tmp_path):
    peft_model, folder = adapter
    out = run(folder, tmp_path / "out", "--dtype", "float32")
    expected = scores(peft_model, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"] for text in TEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file has no bias
        tokens = transformers.AutoModelForTokenClassification.from_pretrained(out, num_labels=1).eval()
    verl = torch.cat([tokens(x).logits[:, -1, 0] for x in ids])  # verl scores every token and takes the last
    torch.testing.assert_close(verl, expected, rtol=1e-4, atol=1e-5)

    ppo = pytest.importorskip("trl.experimental.utils", reason="the bench extra brings trl")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    trl = torch.cat([ppo.get_reward(model, x, model.config.pad_token_id, 1)[1] for x in ids])
    torch.testing.assert_close(trl, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_and_file_size_are_those_of_the_flags_and_the_head_is_float32(adapter, tmp_path, dtype):
    peft_model, folder = adapter
    out = run(folder, tmp_path / "out", "--dtype", dtype, "--max_shard_gb", 2e-5)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and json.loads((out / "config.json").read_text())["problem_type"] == "regression"
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    assert tensors.pop("score.weight").dtype == torch.float32
    assert {x.dtype for x in tensors.values()} == {getattr(torch, dtype)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(scores(model, out), scores(peft_model, out), rtol=0.05, atol=0.05)


def test_an_exported_language_model_is_a_language_model(tmp_path):
    text_fixtures.byte_level(tmp_path / "base")
    hf_model = tiny.llama(vocab_size=400)
    hf_model.save_pretrained(tmp_path / "base")
    out = run(tmp_path / "base", tmp_path / "out", "--dtype", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), hf_model.parameters(), strict=True))


# The mean of several models

PAIRS = [{"positive": f"###Human: {i}?###Assistant: yes {i}", "negative": f"no {i}"} for i in range(12)]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list:
    """Folders of three reward models with contracts, which differ in their weights only."""
    statistics = {"reward_mean": 1.0, "reward_std": 2.0, "reward_set": "mine"}
    return [similar_models.write(tmp_path_factory.mktemp("rm"), seed, **statistics) for seed in range(3)]


def run_average(folders, out, *flags, processes: int = 1):
    argv = ["--average", *map(str, folders), "--output_dir", str(out), "--dtype", "float32", *map(str, flags)]
    run_ranks(processes, lambda: export.main(parse(export.Settings, "", argv)))
    return out


@pytest.mark.parametrize("processes", [1, 2])
def test_the_mean_of_models_has_the_mean_of_each_weight_and_golden_scores_of_its_own(three, tmp_path, processes):
    out = run_average(three, tmp_path / "mean", processes=processes)
    of_models = [load_file(folder / "model.safetensors") for folder in three]
    mean = load_file(out / "model.safetensors")
    assert mean.keys() == of_models[0].keys()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, torch.stack([one[name] for one in of_models]).mean(0))
    first, own = contract.read(three[0]), contract.read(out)
    assert own.golden != first.golden and own.reward_mean is None  # of the mean, nothing has been measured
    assert replace(own, golden=first.golden, reward_mean=1.0, reward_std=2.0, reward_set="mine") == first
    hf_model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    texts = [one.text for one in own.golden[:3]]
    with mock.patch(f"{__name__}.TEXTS", texts):
        assert Scorer(out).score(texts) == pytest.approx(scores(hf_model, out).tolist(), abs=1e-4)


def test_each_model_and_the_mean_are_evaluated_where_pairs_are_given(three, tmp_path, capfd):
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    out = run_average(three, tmp_path / "mean", "--dataset_path", tmp_path / "pairs.json")
    said = dict(re.findall(r"^(\S+): accuracy ([\d.]+) ", capfd.readouterr().out, flags=re.M))
    texts = [pair[side] for pair in PAIRS for side in ("positive", "negative")]
    for name, folder in [*((str(folder), folder) for folder in three), ("mean", out)]:
        rewards = torch.tensor(Scorer(folder).score(texts)).view(-1, 2)
        assert float(said.pop(name)) == pytest.approx((rewards[:, 0] > rewards[:, 1]).double().mean().item(), abs=1e-4)
        best = rewards[:, 0].double()  # of the mean at last
    assert not said
    accuracy = (rewards[:, 0] > rewards[:, 1]).double().mean().item()
    card = (out / "README.md").read_text()
    assert f"| the mean | 12 | {accuracy:.4f} |" in card and "are the mean of 3 models'" in card
    own = contract.read(out)
    assert own.reward_mean == pytest.approx(best.mean().item(), abs=1e-4)
    assert own.reward_std == pytest.approx(best.std(correction=0).item(), abs=1e-4)
    assert own.reward_set == f"12 examples of {tmp_path / 'pairs.json'}"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rms_norm_eps": 1e-3}, "norm_eps of .* is 0.001, and of .* 1e-06: only models of one arch"),
        ("scoring.json", {"max_length": 300}, "max_length in scoring.json of .* is 300, and of .* 200: only"),
        ("scoring.json", None, "scoring.json of .* is 'missing', and of .* 'there'"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "the tokenizer of .* is '"),
    ],
)
def test_models_that_differ_in_more_than_weights_have_no_mean(three, tmp_path, file, changes, message):
    other = tmp_path / "other"
    shutil.copytree(three[1], other)
    if changes is None:
        (other / file).unlink()
    else:
        (other / file).write_text(json.dumps(json.loads((other / file).read_text()) | changes))
    settings = parse(export.Settings, "", ["--average", str(three[0]), str(other), "--output_dir", str(tmp_path / "x")])
    with dist.session(0), pytest.raises(ValueError, match=message):
        export.main(settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --model_name_or_path, or --average"),
        ({"model_name_or_path": "a", "average": ("a", "b")}, "give --model_name_or_path, or --average"),
        ({"average": ("a",)}, "--average needs two models at least"),
        ({"average": ("a", "b", "a")}, "--average names a model twice: a b a"),
        ({"model_name_or_path": "a", "dataset_path": ("b",)}, "--dataset_path goes with --average"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        compose(export.Settings, output_dir="x", **given)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_mean_reward_can_be_subtracted_in_the_bias_of_a_head(tmp_path, processes):
    source = similar_models.write(tmp_path / "rm", seed=0, head="two layers")
    before = torch.tensor(Scorer(source).score(TEXTS))
    similar_models.write(source, seed=0, head="two layers", reward_mean=before.mean().item(), reward_std=1.0)
    out = run(source, tmp_path / "out", "--center_rewards", "true", "--dtype", "float32", processes=processes)
    after, scorer = before - before.mean(), Scorer(out)  # which checks the golden scores
    assert scorer.score(TEXTS) == pytest.approx(after.tolist(), abs=1e-5)
    assert scorer.contract.reward_mean == 0
    assert scorer.score(TEXTS, normalized=True) == pytest.approx(after.tolist(), abs=1e-5)


def test_a_mean_reward_that_cannot_be_subtracted_is_an_error(three, tmp_path):
    with pytest.raises(RuntimeError, match="its reward head has no bias"):
        run(three[0], tmp_path / "out", "--center_rewards", "true")
    with pytest.raises(RuntimeError, match="has no scoring.json that states the mean"):
        run(similar_models.write(tmp_path / "rm", seed=0), tmp_path / "out", "--center_rewards", "true")
    assert not (tmp_path / "out").exists()


def test_two_exports_do_not_write_to_one_folder(three, tmp_path):
    words = ["--model_name_or_path", three[0], "--output_dir", tmp_path / "out"]
    held = lease.Lease(tmp_path / ".out.lease")
    done = commands.run("rm.export", *words)
    assert done.returncode == 2 and "is in use by process" in done.stderr and not (tmp_path / "out").exists()
    held.release()
    assert commands.run("rm.export", *words).returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
