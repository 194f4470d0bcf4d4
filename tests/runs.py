"""Whole runs of the training scripts in forked processes, and what they leave: for tests of what befalls a run."""

import functools
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_rm
import train_sft
from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from tests import text_fixtures, tiny
from tests.ranks import run_ranks

TEXTS = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(6) for b in range(5)]


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="runs-")  # goes when the tests end


@functools.cache
def world() -> Path:
    """A folder with a tiny LLaMA, texts and pairs; pairs have whole conversations of their own."""
    folder = Path(_temporary().name)
    text_fixtures.byte_level(folder / "model")
    tiny.llama(vocab_size=400).save_pretrained(folder / "model")
    (folder / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in TEXTS]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


def settings(out: Path, script=train_rm, **changes):
    """Of a run of 9 steps: three epochs over 24 pairs, 8 a step; lines of metrics and checkpoints do not coincide."""
    data = world() / ("texts.json" if script is train_sft else "pairs.json")
    made = dict(
        model_name_or_path=str(world() / "model"), dataset_path=(str(data),), output_dir=str(out), max_tokens=200,
        cache_dir=str(world() / "cache"), validation_split_percentage=20, global_batch_size=8, num_train_epochs=3,
        logging_steps=4, eval_steps=3, learning_rate=1e-3, save_steps=2,
    )  # fmt: skip
    return script.Settings(**made | changes)


def flags(chosen) -> list[str]:
    """A command line that says the same."""
    words = []
    for name, value in vars(chosen).items():
        if value not in (None, ()):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def main(chosen, before: Callable[[], None] = lambda: None) -> None:
    """What a process runs: the script, after `before` has prepared its misfortune."""
    before()
    script = train_sft if isinstance(chosen, train_sft.Settings) else train_rm
    try:
        script.main(chosen)
    except (dist.Stopped, SystemExit):
        pass


def outcome(chosen) -> tuple[dict, list[dict]]:
    """The weights and the lines of metrics that a run left, without what clock and memory have to do with."""
    out = Path(chosen.output_dir)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    same = [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]
    return load_file(out / "model" / "model.safetensors"), same


def assert_same(one: tuple, other: tuple) -> None:
    """Of two outcomes: to the last bit."""
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@functools.cache
def undisturbed(processes: int, script=train_rm, **changes) -> tuple:
    """The outcome of a run that nothing happens to."""
    chosen = settings(Path(tempfile.mkdtemp(dir=_temporary().name)) / "out", script, **changes)
    run_ranks(processes, main, chosen)
    return outcome(chosen)


def exit_marker(chosen) -> dict:
    return json.loads((Path(chosen.output_dir) / "exit.json").read_text())


def checkpoints(chosen) -> list[Path]:
    return checkpoint.list_checkpoints(Path(chosen.output_dir) / "checkpoints")


def steps_saved(chosen) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoints(chosen)]


def die(*_, **__) -> None:
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


def befalls(owner, name: str, call: int, act: Callable = die, rank: int = 0) -> Callable[[], None]:
    """A misfortune for `main`: on one rank, `owner.name` does `act` at a call of this number."""

    def prepare():
        if dist.rank() == rank:
            setattr(owner, name, at_call(call, act, getattr(owner, name)))

    return prepare
