"""Whole runs of the training scripts in forked processes, faults injected into them, and what they leave behind."""

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
from rm.config import compose, flatten
from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from tests import text_fixtures, tiny
from tests.ranks import run_ranks

TEXTS = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(6) for b in range(5)]


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="runs-")  # removed when the tests end


@functools.cache
def world() -> Path:
    """A folder with a tiny LLaMA, texts and pairs; every pair is a conversation of its own."""
    folder = Path(_temporary().name)
    text_fixtures.byte_level(folder / "model")
    tiny.llama(vocab_size=400).save_pretrained(folder / "model")
    (folder / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in TEXTS]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "prompts.json").write_text(json.dumps(list(_pairs_of_prompts())))
    return folder


def _pairs_of_prompts():
    """Three pairs of each prompt, of three replies."""
    for a in range(12):
        prompt, replies = f"###Human: what is {a} and 1?###Assistant: ", [f"it is {a + 1}.", f"{a}.", "no."]
        for better, worse in ((0, 1), (0, 2), (1, 2)):
            yield {"prompt": prompt, "chosen": replies[better], "rejected": replies[worse], "weight": 1 + a % 2}


def settings(out: Path, script=train_rm, **changes):
    """Settings of a run of 9 steps: three epochs of 24 pairs, 8 a step; its metrics and checkpoints do not coincide."""
    data = world() / ("texts.json" if script is train_sft else "pairs.json")
    values = dict(
        model_name_or_path=str(world() / "model"), dataset_path=(str(data),), output_dir=str(out), max_tokens=200,
        cache_dir=str(world() / "cache"), validation_split_percentage=20, global_batch_size=8, num_train_epochs=3,
        logging_steps=4, eval_steps=3, learning_rate=1e-3, save_steps=2,
    )  # fmt: skip
    return compose(script.Settings, **values | changes)


def flags(config) -> list[str]:
    """The command line of some settings."""
    words = []
    for name, value in flatten(config).items():
        if value not in (None, ()):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def main(config, inject: Callable[[], None] = lambda: None) -> None:
    """What a process runs: the script, after `inject` has prepared a fault; without the HTML report.

    The report takes twice as long as all the rest: importing matplotlib, and drawing.
    """
    inject()
    script = train_sft if isinstance(config, train_sft.Settings) else train_rm
    script.write_report = lambda folder, if_missing=False: None  # in this forked process only
    try:
        script.main(config)
    except (dist.Stopped, SystemExit):
        pass


def outcome(config) -> tuple[dict, list[dict]]:
    """The weights and the lines of metrics that a run left, without times and memory."""
    out = Path(config.run.output_dir)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    repeatable = [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]
    return load_file(out / "model" / "model.safetensors"), repeatable


def assert_same(one: tuple, other: tuple) -> None:
    """Two outcomes are bit-identical."""
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@functools.cache
def undisturbed(processes: int, script=train_rm, **changes) -> tuple:
    """The outcome of a run without a fault."""
    config = settings(Path(tempfile.mkdtemp(dir=_temporary().name)) / "out", script, **changes)
    run_ranks(processes, main, config)
    return outcome(config)


def exit_marker(config) -> dict:
    return json.loads((Path(config.run.output_dir) / "exit.json").read_text())


def checkpoints(config) -> list[Path]:
    return checkpoint.list_checkpoints(Path(config.run.output_dir) / "checkpoints")


def steps_saved(config) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoints(config)]


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, act: Callable, function: Callable) -> Callable:
    """`function`, but its call of this number (from 1) runs `act` first."""
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return counted


def fault(owner, name: str, call: int, act: Callable = die, rank: int = 0) -> Callable[[], None]:
    """A fault for `main`: on one rank, `owner.name` runs `act` at its call of this number, from 1."""

    def inject():
        if dist.rank() == rank:
            setattr(owner, name, at_call(call, act, getattr(owner, name)))

    return inject
