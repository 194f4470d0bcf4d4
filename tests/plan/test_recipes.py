"""launch/recipes: every recipe of a published reward model is planned as it stands, but for its model and data."""

import json
from pathlib import Path

import pytest

import train_rm
from rm.config import parse
from rm.distributed import process_group as dist
from tests import text_fixtures, tiny

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


@pytest.mark.apart
@pytest.mark.parametrize("name", ["skywork-reward-v2", "grm", "tulu-3-8b"])
def test_a_recipe_is_planned(name, tmp_path, capsys):
    text_fixtures.byte_level(tmp_path / "model")
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "model")
    pairs = [
        {"prompt": f"{i} + {i}? ", "chosen": f"it is {2 * i}.", "rejected": "no " * (i % 5 + 1)} for i in range(300)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)))
    changes = ["--model_name_or_path", tmp_path / "model", "--dataset_path", data, "--output_dir", tmp_path / "out"]
    flags = ["--config", RECIPES / f"{name}.rm.json", *changes, "--cache_dir", tmp_path / "cache"]
    settings = parse(train_rm.Settings, "", [*map(str, flags), "--plan", "true", "--world_size", "8"])
    with dist.session(0):
        train_rm.main(settings)
    printed = capsys.readouterr().out
    assert "plan for 8 processes" in printed and ", fits" in printed
    expected = {"skywork-reward-v2": 1, "grm": 2, "tulu-3-8b": 2}[name]  # of 300 pairs, of which some are held out
    assert f"steps          {expected}, {expected} an epoch" in printed
