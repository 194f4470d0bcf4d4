"""docs/recipes.md: its trainings and plans run as they are written, on a small model by the name of the large one."""

import json
import os
import runpy
import shlex
import sys

import pytest

from rm.report import training
from tests import commands, docs_pages, text_fixtures, tiny
from tests.runs import TEXTS

ROOT = docs_pages.ROOT
COMMANDS = docs_pages.commands((ROOT / "docs" / "recipes.md").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands find before SFT: the recipes, the data that rm.prepare_hh writes, and the model."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "launch").symlink_to(ROOT / "launch")
    model = folder / "huggyllama" / "llama-7b"
    text_fixtures.byte_level(model)
    tiny.llama(vocab_size=400, max_position_embeddings=2048).save_pretrained(model)
    (folder / "data" / "hh_rlhf").mkdir(parents=True)
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in TEXTS]
    for name, records in (("sft", [{"text": text} for text in TEXTS]), ("rm", pairs[:20]), ("test", pairs[20:])):
        (folder / "data" / "hh_rlhf" / f"{name}.json").write_text(json.dumps({"instances": records}))
    return folder


def run(command: str, folder) -> str:
    """Its output; torchrun's eight processes are two."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))

    def start():
        os.chdir(folder)
        training.figures.curves = lambda *_: ""  # to draw takes longer than all the rest
        sys.argv = words[words.index(script) :]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    done = commands.call(start, timeout=240, processes=2 if words[0] == "torchrun" else 0)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reward_model_is_planned_before_sft_has_run_and_then_both_are_trained(folder):
    sft, rm, plan = (
        one(command for command in COMMANDS if script in command and ("--plan" in command) == is_plan)
        for script, is_plan in (("train_sft.py", False), ("train_rm.py", False), ("train_rm.py", True))
    )
    assert "GiB" in run(plan, folder)
    run(sft, folder)
    run(rm, folder)
    for name in ("sft", "rm"):
        assert json.loads((folder / "runs/llama-7b" / name / "exit.json").read_text())["status"] == "finished"
    contract = json.loads((folder / "runs/llama-7b/rm/model/scoring.json").read_text())
    assert contract["reward_set"] == f"{len(TEXTS)} demonstrations of data/hh_rlhf/sft.json"


def one(commands_of_llama) -> str:
    (command,) = (command for command in commands_of_llama if "llama-7b" in command)
    return command
