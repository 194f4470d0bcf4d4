"""rm.demo: reproducible data in the recipe's format, unseen test questions, no shortcuts, a loadable model."""

import collections
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rm import demo
from rm.data import dataset
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer
from rm.hf import weights

DIALOGUE = re.compile(r"(###Human: [^#]+###Assistant: [^#]+){1,3}")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "world"
    demo.main([str(folder)])
    return folder


def texts(world: Path) -> list[str]:
    document = json.loads((world / "sft.json").read_text())
    assert document["type"] == "text_only" and list(document) == ["type", "instances"]
    assert all(list(instance) == ["text"] for instance in document["instances"])
    return [instance["text"] for instance in document["instances"]]


def pairs(world: Path, name: str) -> list[dict]:
    records = [json.loads(line) for line in (world / name).read_text().splitlines()]
    assert all(list(pair) == ["positive", "negative", "subset"] for pair in records)
    return records


def prompt(text: str) -> str:
    return text.rpartition("###Assistant:")[0]


def questions(text: str) -> list[str]:
    return re.findall(r"###Human: (.+?)###Assistant:", text)


def reply(text: str) -> str:
    return text.rpartition("###Assistant:")[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_files_are_identical_for_one_seed_and_differ_between_seeds(world, tmp_path):
    subprocess.run([sys.executable, "-m", "rm.demo", str(tmp_path / "again")], check=True, capture_output=True)
    demo.main([str(tmp_path / "other"), "--seed", "1"])
    same, other = contents(tmp_path / "again"), contents(tmp_path / "other")
    assert same == contents(world)
    assert {name for name in same if same[name] == other[name]} == {
        "model/config.json",
        "model/special_tokens_map.json",
        "model/tokenizer_config.json",
    }


def test_every_text_has_the_recipes_format(world):
    dialogues = texts(world)
    for name in ("rm_train.jsonl", "rm_test.jsonl"):
        dialogues += [pair[side] for pair in pairs(world, name) for side in ("positive", "negative")]
    assert all(DIALOGUE.fullmatch(text) for text in dialogues)
    assert {text.count("###Human:") for text in dialogues} == {1, 2, 3}


def test_dataset_readers_keep_every_record(world):
    tokenizer = Tokenizer(world / "model")
    examples, _ = dataset.read(Task.SFT, [world / "sft.json"], tokenizer, max_length=512)
    assert len(examples) == demo.DIALOGUES
    for name, count in (("rm_train.jsonl", demo.TRAIN_PAIRS), ("rm_test.jsonl", demo.TEST_PAIRS)):
        examples, _ = dataset.read(Task.PREFERENCE, [world / name], tokenizer, max_length=512)
        assert len(examples) == count


def test_the_texts_of_a_pair_differ_in_the_reply_only(world):
    for pair in pairs(world, "rm_train.jsonl") + pairs(world, "rm_test.jsonl"):
        assert prompt(pair["positive"]) == prompt(pair["negative"])
        assert reply(pair["positive"]) != reply(pair["negative"])


def test_pairs_are_distinct(world):
    for name in ("rm_train.jsonl", "rm_test.jsonl"):
        records = pairs(world, name)
        assert len({(pair["positive"], pair["negative"]) for pair in records}) == len(records)


def test_the_last_questions_of_test_pairs_are_not_in_the_training_data(world):
    training_questions = {q for text in texts(world) for q in questions(text)}
    training_questions |= {q for pair in pairs(world, "rm_train.jsonl") for q in questions(pair["positive"])}
    assert not training_questions & {questions(pair["positive"])[-1] for pair in pairs(world, "rm_test.jsonl")}


def test_every_fact_is_in_the_sft_dialogues(world):
    sft_questions = {q for text in texts(world) for q in questions(text)}
    assert all(sft_questions.intersection(fact.questions) for fact in demo.make_facts(random.Random(0)))


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_subsets_have_their_shares_of_the_pairs(world, name):
    counts = collections.Counter(pair["subset"] for pair in pairs(world, name))
    assert counts == {subset: share * counts.total() for subset, share in demo.SHARES.items()}


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_the_longer_text_is_the_better_one_in_half_of_the_pairs(world, name):
    longer = [
        (len(pair["positive"]) > len(pair["negative"])) + (len(pair["positive"]) == len(pair["negative"])) / 2
        for pair in pairs(world, name)
    ]
    assert 0.45 < sum(longer) / len(longer) < 0.55


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_an_answer_is_as_often_the_better_one_as_the_worse_one(world, name):
    not_polite = [pair for pair in pairs(world, name) if pair["subset"] != "polite"]
    better, worse = (collections.Counter(reply(pair[side]) for pair in not_polite) for side in ("positive", "negative"))
    assert better == worse


def test_the_model_loads_in_transformers_with_random_weights(world):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(world / "model", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == 1_967_808
    for name, parameter in model.named_parameters():
        mean, std = parameter.mean().item(), parameter.std().item()
        expected = (1, 0) if parameter.ndim == 1 else (0, 0.02)
        assert (mean, std) == pytest.approx(expected, abs=1e-3), name


def test_the_tokenizer_encodes_as_in_transformers_and_has_the_same_eos(world):
    transformers = pytest.importorskip("transformers")
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model"), Tokenizer(world / "model")
    for text in texts(world)[:100]:
        assert reference(text)["input_ids"] == tokenizer.encode(text)
        assert reference.decode(tokenizer.encode(text)) == text
    assert reference.eos_token_id == tokenizer.eos_id == demo.CONFIG["eos_token_id"]
    assert tokenizer.bos_id is None
    assert tokenizer.vocab_size == demo.CONFIG["vocab_size"]


def test_read_config_reads_the_models_config(world):
    config, *_ = weights.read_config(world / "model")
    assert (config.dim, config.n_layers, config.tie_embeddings) == (192, 4, True)
