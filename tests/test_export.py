"""python -m rm.export: other software loads what it writes as the model that was exported."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from rm import export
from rm.config import parse
from tests import text_fixtures, tiny
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
