"""rm.resume, rm.saving: a run that is killed or stopped at any moment goes on as if nothing had happened.

Every run here is the script's own `main` in forked processes; what is killed is killed with SIGKILL.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_rm
import train_sft
from rm import checkpoint, dist, saving, weights
from tests import text_fixtures, tiny
from tests.ranks import run_ranks

TEXTS = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(6) for b in range(5)]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny LLaMA, texts and pairs."""
    folder = tmp_path_factory.mktemp("world")
    text_fixtures.byte_level(folder / "model")
    tiny.llama(vocab_size=400).save_pretrained(folder / "model")
    (folder / "sft.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in TEXTS]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


def settings(world: Path, out: Path, script=train_rm, **changes):
    data = world / ("sft.json" if script is train_sft else "pairs.json")
    made = dict(
        model_name_or_path=str(world / "model"), dataset_path=(str(data),), output_dir=str(out), max_tokens=200,
        cache_dir=str(world / "cache"), validation_split_percentage=20, global_batch_size=8, num_train_epochs=3,
        logging_steps=4, eval_steps=3, learning_rate=1e-3, save_steps=2,
    )  # fmt: skip
    return script.Settings(**made | changes)


def main(chosen, before: Callable[[], None] = lambda: None) -> None:
    """What a process runs: the script, after `before` has prepared its misfortune."""
    before()
    script = train_sft if isinstance(chosen, train_sft.Settings) else train_rm
    try:
        script.main(chosen)
    except (dist.Stopped, SystemExit):
        pass


def outcome(chosen) -> tuple[dict, list[dict]]:
    """The weights and the lines of metrics that a run left, without what a clock has to do with."""
    out = Path(chosen.output_dir)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return load_file(out / "model" / "model.safetensors"), timeless


def exit_marker(chosen) -> dict:
    return json.loads((Path(chosen.output_dir) / "exit.json").read_text())


def steps_saved(chosen) -> list[int]:
    return [checkpoint.step_of(f) for f in checkpoint.published(Path(chosen.output_dir) / "checkpoints")]


def assert_same(one, other) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The outcome of a run that nothing happens to, by (processes, settings)."""
    known = {}

    def of(processes: int, **changes):
        key = processes, *sorted(changes.items())
        if key not in known:
            chosen = settings(world, tmp_path_factory.mktemp("whole") / "out", **changes)
            run_ranks(processes, main, chosen)
            known[key] = outcome(chosen)
        return known[key]

    return of


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, act: Callable, function: Callable) -> Callable:
    """`function`, but its call of this number (from 1) does `act` first."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    return counted


PHASES = {
    "in a step": (train_rm, "train_step", 6),
    "in an evaluation": (train_rm.InOrder if hasattr(train_rm, "InOrder") else train_rm.batch.InOrder, "__iter__", 2),
    "before its file is whole": (checkpoint, "save_file", 2),
    "between its file and its description": (checkpoint, "sync", 2 * 5 + 1),
    "before the rename": (checkpoint.os, "rename", 3),
    "between rename and prune": (saving.Checkpoints, "_prune", 3),
    "in the middle of pruning": (checkpoint.shutil, "rmtree", 2),
    "in the export": (weights, "save", 1),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_any_moment_it_goes_on_bit_for_bit(phase, processes, world, undisturbed, tmp_path):
    owner, name, call = PHASES[phase]
    chosen = settings(world, tmp_path / "out")

    def misfortune():
        if dist.rank() == 0:
            setattr(owner, name, at_call(call, die, getattr(owner, name)))

    with pytest.raises(RuntimeError, match="failed|died"):
        run_ranks(processes, main, chosen, misfortune)
    assert not (tmp_path / "out" / "model").exists() and steps_saved(chosen)
    run_ranks(processes, main, chosen)
    assert_same(outcome(chosen), undisturbed(processes))
    assert exit_marker(chosen)["status"] == "finished"
    assert len(steps_saved(chosen)) == 2 and not list((tmp_path / "out" / "checkpoints").glob(".*"))


def test_sigterm_under_torchrun_saves_at_one_step_and_the_same_command_goes_on(world, undisturbed, tmp_path):
    """Real torchrun, real signal; sent three times, as a scheduler may."""
    chosen = settings(world, tmp_path / "out", num_train_epochs=40, save_steps=500)
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(chosen).items() if isinstance(value, (str, int))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "train_rm.py", *flags, "--dataset_path", *chosen.dataset_path, "--learning_rate", "1e-3",
               "--num_train_epochs", "40"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=30)
    marker = exit_marker(chosen)
    assert marker["status"] == "stopped" and marker["reason"] == "SIGTERM" and 0 < marker["step"] < marker["steps"]
    assert steps_saved(chosen) == [marker["step"]]
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, num_train_epochs=40, save_steps=500))
