"""Fuzzing of the JSON files that commands read: mutated, they are read or refused in one line; nothing else.

    python -m tests.test_fuzz_files 3000          so many mutations (here: a few), with their seeds; prints what failed

Each mutation changes one file in a copy of a run, a model, a checkpoint, a cache or an evaluation, and runs a command
on it in this process. It must end with status 0, or with status 2 and one line that names the file; on the terminal
there must be no control character. tokenizer.json is left out: what the library makes of it is not ours.
"""

import contextlib
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import eval_rm
import train_rm
from rm import cli
from rm.config import parse
from rm.distributed import lease
from rm.distributed import process_group as dist
from rm.report import html, training
from tests import text_fixtures, tiny

CASES = 46
EXTREMES = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**300, -(10**300), 0.5, 1e-300, 1e300, float("nan"), float("inf"), "",
    "x", "x" * 5000, "\ud800", "../../etc/passwd", "/dev/zero", "a\x1b[31m\nfinished: well", "\u202eabc", [], {}, [[]],
    [None], [1, "a"], {"a": 1}, {"": None}, [[[[1]]]],
]  # fmt: skip


class World:
    """Folders that commands left, each made once; `copy` has them anew."""

    def __init__(self, top: Path):
        self.top, self.good = top, top / "good"
        text_fixtures.byte_level(self.good / "base")
        tiny.llama(vocab_size=400).save_pretrained(self.good / "base")
        texts = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(4) for b in range(3)]
        pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in texts]
        (top / "pairs.json").write_text(json.dumps(pairs))
        for name, more in (("run", []), ("lora", ["--use_lora", "true", "--lora_r", "2"])):
            status, said = self.command(train_rm, *self.training(self.good, name), *more)
            assert status == 0, said
        (self.good / "run/plan.json").write_text(json.dumps({"peak": 1e9, "processes": 1, "settings": {}}))
        status, said = self.command(eval_rm, *self.evaluation(self.good, "run/model"))
        assert status == 0, said
        tensors = {"metadata": {}, "weight_map": {}}
        shutil.copytree(self.good / "run/model", self.good / "shards")
        from safetensors import safe_open

        (self.good / "shards/model.safetensors").rename(self.good / "shards/model-1-of-1.safetensors")
        with safe_open(self.good / "shards/model-1-of-1.safetensors", "pt") as file:
            tensors["weight_map"] = dict.fromkeys(file.keys(), "model-1-of-1.safetensors")
        (self.good / "shards/model.safetensors.index.json").write_text(json.dumps(tensors))

    def training(self, world: Path, name: str = "run") -> list:
        return [
            "--model_name_or_path", self.good / "base", "--dataset_path", self.top / "pairs.json", "--output_dir",
            world / name, "--cache_dir", world / "cache", "--max_steps", 2, "--save_steps", 1, "--logging_steps", 1,
            "--global_batch_size", 4, "--max_tokens", 200, "--validation_split_percentage", 20,
        ]  # fmt: skip

    def evaluation(self, world: Path, model: str) -> list:
        return [
            "--model_name_or_path", world / model, "--dataset_path", self.top / "pairs.json", "--output_dir",
            world / "eval", "--cache_dir", world / "cache",
        ]  # fmt: skip

    def command(self, script, *words) -> tuple[int | str, str]:
        """(exit status, or a traceback; what was printed)"""

        def run() -> None:
            if script is training:
                training.write_training_report(words[0])
                training.write_model_card(*words)
                return
            settings = parse(script.Settings, script.__doc__, list(map(str, words)))
            out = settings.run.output_dir if script is train_rm else settings.evaluation.output_dir
            with dist.session(0), lease.held(out):
                script.main(settings)

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                with cli.one_line_errors():
                    run()
                status = 0
            except SystemExit as done:
                status = done.code
            except BaseException:
                status = traceback.format_exc()
        return status, said.getvalue()


def again(world: World, here: Path):
    """The same training again: its files are looked at, and a finished one is completed."""
    (here / "run/report.html").unlink()
    return world.command(train_rm, *world.training(here))


def resumed(world: World, here: Path):
    """The same training again, killed before its end."""
    shutil.rmtree(here / "run/model")
    shutil.rmtree(here / "run/checkpoints/step_2")
    return world.command(train_rm, *world.training(here))


def of_model(name: str) -> Callable:
    def evaluated(world: World, here: Path):
        shutil.rmtree(here / "eval")
        return world.command(eval_rm, *world.evaluation(here, name))

    return evaluated


def evaluated_again(world: World, here: Path):
    return world.command(eval_rm, *world.evaluation(world.good, "run/model"), "--output_dir", here / "eval")


def reported(world: World, here: Path):
    return world.command(training, here / "run", here / "eval")


def repeated(world: World, here: Path):
    return world.command(train_rm, "--config", here / "run/run.json", "--output_dir", here / "other")


COMMANDS = [  # (file, what reads it)
    ("run/model/config.json", of_model("run/model")),
    ("run/model/scoring.json", of_model("run/model")),
    ("run/model/tokenizer_config.json", of_model("run/model")),
    ("shards/model.safetensors.index.json", of_model("shards")),
    ("lora/adapter/adapter_config.json", of_model("lora/adapter")),
    ("lora/adapter/scoring.json", of_model("lora/adapter")),
    *((f"run/{name}", again) for name in ("run.json", "exit.json", "metrics.jsonl", "plan.json")),
    *((f"run/{name}", resumed) for name in ("run.json", "metrics.jsonl", "checkpoints/step_1/state.json")),
    *((f"{run}/checkpoints/step_1/state.json", of_model(f"{run}/checkpoints/step_1")) for run in ("run", "lora")),
    ("cache/*/made.json", resumed),
    ("cache/*/checksums.json", resumed),
    ("eval/report.json", evaluated_again),
    *((name, reported) for name in ("run/run.json", "run/metrics.jsonl", "run/model/scoring.json", "eval/report.json")),
    ("run/run.json", repeated),
]  # fmt: skip


def mutated(text: str, draw: random.Random) -> bytes:
    """A JSON text in which one value is another, a key is missing or renamed; or whose bytes are damaged."""
    kind = draw.random()
    if kind < 0.15:
        raw, at = bytearray(text.encode()), draw.randrange(len(text))
        raw[at] ^= 1 << draw.randrange(8)
        return draw.choice([
            bytes(raw), text.encode()[:at], b"", b"[" * 100_000, b'{"a":' * 100_000, text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(), b"\x00" * len(text), text.encode() * 2, b"9" * 5000, b"null",
        ])  # fmt: skip
    value = json.loads(text)
    places = list(_places(value))
    holder, key = draw.choice(places)
    if kind < 0.3 and isinstance(holder, dict):
        removed = holder.pop(key)
        if kind < 0.2:
            holder[f"{key}_"] = removed
    elif kind < 0.4:
        holder[key] = str(holder[key]) if not isinstance(holder[key], str) else [holder[key]]
    else:
        holder[key] = draw.choice(EXTREMES)
    return json.dumps(value).encode()


def _places(value):
    """All (object or list, key or index) in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)


def problem(world: World, seed: int) -> str | None:
    """Run a command on a world with one mutated file. None, or what is wrong with its end."""
    draw = random.Random(seed)
    name, command = COMMANDS[seed % len(COMMANDS)]
    here = world.top / f"case{seed}"
    shutil.copytree(world.good, here, copy_function=shutil.copyfile, ignore=lambda *_: ["base"])
    try:
        file = draw.choice(sorted(here.glob(name)))
        text = file.read_text()
        if name.endswith(".jsonl"):
            lines = text.splitlines()
            at = draw.randrange(len(lines))
            before, after = "".join(f"{x}\n" for x in lines[:at]).encode(), "".join(f"\n{x}" for x in lines[at + 1 :])
            content = before + mutated(lines[at], draw) + after.encode() + b"\n"
        else:
            content = mutated(text, draw)
        file.write_bytes(content)
        if draw.random() < 0.7:  # as if somebody had also made the checksums anew
            if file.name == "state.json":
                (file.parent / "COMPLETE").write_text(f"{hashlib.sha256(content).hexdigest()}\n")
            (file.parent / "SHA256SUMS").unlink(missing_ok=True)
        status, said = command(world, here)
        last = (said.strip().splitlines() or [""])[-1]
        if isinstance(status, str):
            return f"{name} {command.__name__}: {status}"
        if status not in (0, 2):
            return f"{name} {command.__name__}: status {status}"
        if any(c < " " and c not in "\n\t\r" or c in "\x7f\x9b\u202e" for c in said):
            return f"{name} {command.__name__}: raw characters in {said[-300:]!r}"
        if status == 2 and not ("error: " in last and any(str(file.parent) in line for line in said.splitlines())):
            return f"{name} {command.__name__}: {last!r} does not name the file"
        return None
    finally:
        shutil.rmtree(here)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Imports and drawing would take most of the time.
        patch.setattr(html, "figures", lambda *_: "")
        yield World(tmp_path_factory.mktemp("fuzz"))


def test_mutated_files_are_read_or_refused_in_one_line(world):
    failed = {seed: found for seed in range(CASES) if (found := problem(world, seed))}
    assert not failed, "\n".join(f"seed {seed}: {found}" for seed, found in failed.items())


def main(first: int, last: int) -> None:
    html.figures = lambda *_: ""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        world, failed = World(Path(top)), 0
        for seed in range(first, last):
            if found := problem(world, seed):
                failed += 1
                print(f"seed {seed}: {found}", flush=True)
        print(f"{last - first:,} mutated files, of {len(COMMANDS)} kinds: {failed} wrong")
        sys.exit(failed > 0)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*([0, *numbers] if len(numbers) == 1 else numbers))
