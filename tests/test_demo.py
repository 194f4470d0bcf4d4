"""The demo world: reproducible, held out, without a giveaway, in the recipe's format, loads in transformers."""

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
    found = [json.loads(line) for line in (world / name).read_text().splitlines()]
    assert all(list(pair) == ["positive", "negative", "subset"] for pair in found)
    return found


def prompt(text: str) -> str:
    return text.rpartition("###Assistant:")[0]


def questions(text: str) -> list[str]:
    return re.findall(r"###Human: (.+?)###Assistant:", text)


def reply(text: str) -> str:
    return text.rpartition("###Assistant:")[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_seed_gives_the_same_bytes_in_another_process_and_another_seed_gives_others(world, tmp_path):
    subprocess.run([sys.executable, "-m", "rm.demo", str(tmp_path / "again")], check=True, capture_output=True)
    demo.main([str(tmp_path / "other"), "--seed", "1"])
    same, other = contents(tmp_path / "again"), contents(tmp_path / "other")
    assert same == contents(world)
    assert {name for name in same if same[name] == other[name]} == {
        "model/config.json",
        "model/special_tokens_map.json",
        "model/tokenizer_config.json",
    }


def test_every_text_has_the_shape_of_the_recipe(world):
    everything = texts(world)
    for name in ("rm_train.jsonl", "rm_test.jsonl"):
        everything += [pair[side] for pair in pairs(world, name) for side in ("positive", "negative")]
    assert all(DIALOGUE.fullmatch(text) for text in everything)
    assert {text.count("###Human:") for text in everything} == {1, 2, 3}


def test_our_reader_keeps_every_record(world):
    tokenizer = Tokenizer(world / "model")
    found, _ = dataset.texts([world / "sft.json"], tokenizer, max_length=512)
    assert len(found) == demo.DIALOGUES
    for name, count in (("rm_train.jsonl", demo.TRAIN_PAIRS), ("rm_test.jsonl", demo.TEST_PAIRS)):
        found, _ = dataset.pairs([world / name], tokenizer, max_length=512)
        assert len(found) == count


def test_the_two_texts_of_a_pair_share_the_prompt_and_differ_in_the_reply(world):
    for pair in pairs(world, "rm_train.jsonl") + pairs(world, "rm_test.jsonl"):
        assert prompt(pair["positive"]) == prompt(pair["negative"])
        assert reply(pair["positive"]) != reply(pair["negative"])


def test_no_pair_occurs_twice(world):
    for name in ("rm_train.jsonl", "rm_test.jsonl"):
        found = pairs(world, name)
        assert len({(pair["positive"], pair["negative"]) for pair in found}) == len(found)


def test_no_question_that_the_test_ends_in_is_asked_anywhere_in_training(world):
    trained = {q for text in texts(world) for q in questions(text)}
    trained |= {q for pair in pairs(world, "rm_train.jsonl") for q in questions(pair["positive"])}
    assert not trained & {questions(pair["positive"])[-1] for pair in pairs(world, "rm_test.jsonl")}


def test_every_fact_is_taught_in_the_sft_dialogues(world):
    asked = {q for text in texts(world) for q in questions(text)}
    assert all(asked.intersection(fact.questions) for fact in demo.make_facts(random.Random(0)))


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_the_kinds_of_pairs_have_their_shares(world, name):
    counts = collections.Counter(pair["subset"] for pair in pairs(world, name))
    assert counts == {subset: share * counts.total() for subset, share in demo.SHARES.items()}


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_the_longer_text_is_the_better_one_half_of_the_time(world, name):
    longer = [
        (len(pair["positive"]) > len(pair["negative"])) + (len(pair["positive"]) == len(pair["negative"])) / 2
        for pair in pairs(world, name)
    ]
    assert 0.45 < sum(longer) / len(longer) < 0.55


@pytest.mark.parametrize("name", ["rm_train.jsonl", "rm_test.jsonl"])
def test_an_answer_that_is_wrong_or_off_topic_is_as_often_the_better_one(world, name):
    found = [pair for pair in pairs(world, name) if pair["subset"] != "polite"]
    better, worse = (collections.Counter(reply(pair[side]) for pair in found) for side in ("positive", "negative"))
    assert better == worse


def test_the_model_loads_in_transformers_and_has_random_weights(world):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(world / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == 1_967_808
    for name, parameter in model.named_parameters():
        mean, std = parameter.mean().item(), parameter.std().item()
        expected = (1, 0) if parameter.ndim == 1 else (0, 0.02)
        assert (mean, std) == pytest.approx(expected, abs=1e-3), name


def test_transformers_and_we_encode_alike_and_end_in_the_same_token(world):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(world / "model"), Tokenizer(world / "model")
    for text in texts(world)[:100]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id == demo.CONFIG["eos_token_id"]
    assert ours.bos_id is None
    assert ours.vocab_size == demo.CONFIG["vocab_size"]


def test_our_weights_module_reads_the_config(world):
    config, *_ = weights.read_config(world / "model")
    assert (config.dim, config.n_layers, config.tie_embeddings) == (192, 4, True)
