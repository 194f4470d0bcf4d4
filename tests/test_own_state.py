"""docs/own_state.md: its example trains on one process as on two, and a run that was stopped ends as one that was not.

The files of the example are made from the page: a module, and lines that change train_rm.py.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm.distributed import process_group as dist
from tests.ranks import run_ranks
from tests.runs import assert_same, at_call, checkpoints, outcome, settings, undisturbed

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "own_state.md").read_text()
DECAY = 0.99


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)
    return text


def patched(source: str, diff: str) -> str:
    """A source file with the hunks of a diff applied; each is found by its text."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"docs/own_state.md: not found once in train_rm.py:\n{before}"
        source = source.replace(before, after)
    return source


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """train_rm.py with the page's changes, as a module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ema.py").write_text(block("python"))
    (folder / "train_own.py").write_text(patched((ROOT / "train_rm.py").read_text(), block("diff")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("train_own", folder / "train_own.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "train_own", module)
        spec.loader.exec_module(module)
        yield module


def train(script, config, stop_at: int | None = None) -> None:
    """What a process runs; it is stopped at its evaluation of this number, from 1."""

    def stop():
        raise dist.Stopped("SIGTERM", 15)

    script.write_report = lambda folder, if_missing=False: None  # in this forked process only
    if stop_at is not None:
        script.evaluate = at_call(stop_at, stop, script.evaluate)
    try:
        script.main(config)
    except dist.Stopped:
        pass


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def test_the_average_is_what_its_formula_gives_and_is_what_is_evaluated_and_saved(script, tmp_path):
    config = settings(tmp_path / "one", script, save_steps=1, save_total_limit=0)
    run_ranks(1, train, script, config)
    steps = [load_file(folder / "rank_00000.safetensors") for folder in checkpoints(config)]
    expected = steps[0]["parameter/embed.weight"].double()
    for weights in steps[1:]:
        expected = DECAY * expected + (1 - DECAY) * weights["parameter/embed.weight"].double()
    torch.testing.assert_close(steps[-1]["ema/embed.weight"].double(), expected, rtol=0, atol=1e-7)
    saved, lines = outcome(config)
    assert torch.equal(saved["model.embed_tokens.weight"], steps[-1]["ema/embed.weight"])
    tokens = [state_of(folder)["own"]["tokens"] for folder in checkpoints(config)]
    assert len(tokens) == 9 and tokens[0] > 0 and tokens == sorted(set(tokens))

    # Training is as without the average; what is evaluated is not.
    for own, plain in zip(lines, undisturbed(1)[1], strict=True):
        evaluated = "eval_loss" in own
        assert (own == plain) == (not evaluated)
    run_ranks(2, train, script, two := settings(tmp_path / "two", script))
    for of_two, own in zip(outcome(two)[1], lines, strict=True):
        assert of_two == pytest.approx(own, rel=1e-4, abs=1e-6)


def test_a_run_that_was_stopped_with_the_weights_exchanged_ends_as_one_that_was_not(script, tmp_path):
    whole, stopped = (settings(tmp_path / name, script) for name in ("whole", "stopped"))
    run_ranks(2, train, script, whole)
    run_ranks(2, train, script, stopped, 2)
    assert state_of(checkpoints(stopped)[-1])["step"] == 6
    run_ranks(2, train, script, stopped)
    assert_same(outcome(stopped), outcome(whole))
    newest = [state_of(checkpoints(config)[-1]) for config in (stopped, whole)]
    assert newest[0]["step"] == newest[1]["step"] and newest[0]["own"] == newest[1]["own"]
