"""rm.hf.folder: what exported folders say about texts: template, ends of generation, special tokens that were added.

transformers and peft read the folders.
"""

import functools
import json
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train_rm
import train_sft
from rm import export
from rm.config import compose
from rm.data.dataset import TextSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.hf.folder import TextFiles, check_files
from rm.model.heads import LanguageModel
from tests import runs, text_fixtures, tiny
from tests.ranks import run_ranks

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DIALOGUES = [
    [{"role": "user", "content": f"what is {a} and 1?"}, {"role": "assistant", "content": f"it is {a + 1}."}]
    for a in range(8)
]
NEW = ["<|im_start|>", "<|im_end|>"]


def base(folder: Path, kind: str, tied: bool) -> Path:
    """A tiny LLaMA with 400 embeddings. Its tokenizer, of 377 tokens (json) or 400 (spm), lacks those of ChatML."""
    if kind == "json":
        text_fixtures.byte_level(folder)
    else:
        text_fixtures.sentencepiece_model(folder, SPM | {"legacy": False, "add_bos_token": True})
    tiny.llama(vocab_size=400, tie_word_embeddings=tied).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "chatml.jinja").write_text(CHATML)
    pairs = [{"chosen": d, "rejected": [d[0], {"role": "assistant", "content": "no."}]} for d in DIALOGUES]
    for name, records in (("sft", [{"messages": d} for d in DIALOGUES]), ("rm", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def settings(folder: Path, out: Path, script=train_sft, **changes):
    """Of two steps with the ChatML template and its tokens added."""
    data = folder / ("sft.jsonl" if script is train_sft else "rm.jsonl")
    values = dict(
        model_name_or_path=str(folder), dataset_path=(str(data),), validation_split_percentage=0,
        chat_template=str(folder / "chatml.jinja"), add_special_tokens=("auto",), num_train_epochs=2,
        learning_rate=1e-2, save_steps=1,
    )  # fmt: skip
    return runs.settings(out, script, **values | changes)


def train(config) -> Path:
    run_ranks(1, runs.main, config)
    return Path(config.run.output_dir)


METHODS = {
    "full": {},
    "lora": dict(use_lora=True, lora_r=2, lora_dropout=0.0),
    "lisa": dict(use_lisa=True, lisa_activated_layers=1),
}


@pytest.mark.parametrize("kind, tied, method, script", [
    ("json", False, "full", train_sft), ("json", True, "lora", train_sft), ("spm", False, "lora", train_sft),
    ("spm", True, "lisa", train_sft), ("json", False, "lora", train_rm), ("spm", True, "full", train_rm),
])  # fmt: skip
def test_added_tokens_are_trained_and_exported(kind, tied, method, script, tmp_path):
    folder = base(tmp_path / "base", kind, tied)
    out = train(settings(folder, tmp_path / "out", script, **METHODS[method]))
    is_rm = script is train_rm
    auto = transformers.AutoModelForSequenceClassification if is_rm else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    before = len(transformers.AutoTokenizer.from_pretrained(folder))
    new = list(range(before, before + 2))
    assert tokenizer.convert_tokens_to_ids(NEW) == new
    assert model.config.vocab_size == max(400, before + 2)
    ids = tokenizer.apply_chat_template(DIALOGUES[0], return_dict=True)["input_ids"]
    assert [i for i in ids if i in new] == new * 2
    # The mean of the rows of a random model is close to zero; the new rows have moved away from it, each its own way.
    mean = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].mean(0)
    rows = model.get_input_embeddings().weight[new].detach()
    assert not torch.allclose(rows[0], mean, atol=1e-3) and not torch.allclose(rows[0], rows[1], atol=1e-3)
    if not is_rm:
        head = model.get_output_embeddings().weight[new].detach()
        assert torch.equal(head, rows) if tied else not torch.allclose(head, rows, atol=1e-3)
        generation = transformers.GenerationConfig.from_pretrained(out / "model")
        assert generation.eos_token_id[-1] == new[1] and tokenizer.eos_token_id in generation.eos_token_id
    if method == "lora":
        path = json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        options = {"num_labels": 1} if is_rm else {}
        adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(path, **options), out / "adapter")
        beside = transformers.AutoTokenizer.from_pretrained(out / "adapter")
        assert beside.apply_chat_template(DIALOGUES[0], return_dict=True)["input_ids"] == ids
        inputs = torch.tensor([ids])
        assert torch.allclose(model(inputs).logits, adapted(inputs).logits, atol=1e-5)


def test_a_run_with_added_tokens_resumes(tmp_path):
    folder = base(tmp_path / "base", "spm", tied=True)
    changes = METHODS["lora"] | {"save_total_limit": 0}
    whole = train(settings(folder, tmp_path / "whole", **changes))
    checkpoint = str(whole / "checkpoints" / "step_1")
    rest = train(settings(folder, tmp_path / "rest", resume_from_checkpoint=checkpoint, **changes))
    one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, rest))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_new_rows_start_at_the_mean_of_the_others(tmp_path):
    folder = base(tmp_path / "base", "json", tied=False)

    def load(new_ids) -> dict:
        parallel = ParallelSettings(dtype="float32")
        model = build.load(build.build(LanguageModel, folder, parallel, new_ids=new_ids), folder, new_ids=new_ids)
        return {name: sharding.full_tensor(p) for name, p in model.named_parameters()}

    stored = load_file(folder / "model.safetensors")
    for new_ids, others in (([400, 401], slice(0, 400)), ([399, 400], slice(0, 399))):
        for values in run_ranks(2, functools.partial(load, new_ids)):
            for ours, theirs in (("embed.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
                assert torch.allclose(values[ours][new_ids], stored[theirs][others].mean(0), atol=1e-6)
                assert torch.equal(values[ours][others], stored[theirs][others])


def test_an_exported_adapter_has_the_template_that_it_was_trained_with(tmp_path):
    folder = base(tmp_path / "base", "json", tied=True)
    out = train(settings(folder, tmp_path / "out", add_special_tokens=(), **METHODS["lora"]))
    assert not (out / "base").exists()
    values = dict(model_name_or_path=str(out / "adapter"), output_dir=str(tmp_path / "exported"), dtype="float32")
    run_ranks(1, export.main, compose(export.Settings, **values))
    for name in ("model", "adapter", "../exported"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / name)
        assert tokenizer.chat_template == CHATML
    exported, merged = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", out / "model"))
    assert all(torch.allclose(exported[name], merged[name], atol=1e-6) for name in merged)


def test_without_the_flag_a_warning_names_the_tokens_that_are_split(tmp_path, capfd):
    folder = base(tmp_path / "base", "json", tied=True)
    out = train(settings(folder, tmp_path / "out", add_special_tokens=()))
    lines = capfd.readouterr().out.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ") and "--add_special_tokens auto" in line]
    assert "<|im_start|>, <|im_end|>" in warning
    assert json.loads((out / "model" / "config.json").read_text())["vocab_size"] == 400


def test_lisa_that_does_not_train_the_new_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--add_special_tokens needs --lisa_train_embeddings true"):
        settings(tmp_path, tmp_path / "out", use_lisa=True, lisa_train_embeddings=False)


@pytest.mark.parametrize("listed, expected", [(None, [2, 5]), (7, [7, 2, 5]), ([2, 7], [2, 7, 5]), ([5, 2], [5, 2])])
def test_generation_ends_at_the_tokens_that_ended_texts_and_turns(listed, expected, tmp_path):
    folder = text_fixtures.llama_like(tmp_path / "base")
    if listed is not None:
        text_fixtures.write_json(folder / "generation_config.json", {"eos_token_id": listed, "temperature": 0.6})
    texts = text_files(folder, template_that_ends_in_id_5(folder))
    assert texts.generation["eos_token_id"] == expected
    assert texts.generation.get("temperature") == (None if listed is None else 0.6)


def template_that_ends_in_id_5(folder: Path) -> str:
    added = json.loads((folder / "tokenizer.json").read_text())
    token = next(token for token, i in added["model"]["vocab"].items() if i == 5)
    entry = {"id": 5, "content": token, "single_word": False, "lstrip": False, "rstrip": False} | {
        "normalized": False, "special": True
    }  # fmt: skip
    text_fixtures.write_json(folder / "tokenizer.json", added | {"added_tokens": [*added["added_tokens"], entry]})
    (folder / "own.jinja").write_text("{% for m in messages %}{{ m['content'] + '" + token + "\n' }}{% endfor %}")
    return str(folder / "own.jinja")


def text_files(folder: Path, template: str | None) -> TextFiles:
    return TextFiles.of_training(folder, Tokenizer(folder), TextSettings(chat_template=template))


@pytest.mark.parametrize("listed", ["</s>", [None], {"a": 1}])
def test_a_generation_config_that_names_no_ids_is_an_error_before_the_training(listed, tmp_path):
    folder = text_fixtures.llama_like(tmp_path)
    text_fixtures.write_json(folder / "generation_config.json", {"eos_token_id": listed})
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id.* has to be of type whole number"):
        text_files(folder, None)


NO_FILE = {
    "is neither a file nor a folder": os.mkfifo,
    "is a link to nothing": lambda file: file.symlink_to(file.with_name("nowhere")),
    "Too many levels of symbolic links": lambda file: file.symlink_to(file),
    "is a folder; a file is expected": Path.mkdir,
}


@pytest.mark.parametrize("problem", NO_FILE)
def test_what_stands_in_place_of_a_models_file_does_not_pass_for_a_file_that_is_missing(problem, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("scoring.json", "chat_template.jinja", "model-2-of-2.safetensors"):
        NO_FILE[problem](tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.* {problem}"):
            check_files(tmp_path)
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
