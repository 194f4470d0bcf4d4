"""What the cluster tests share: what they need, processes by number, the small training run and what it did."""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rm import demo

ROOT = Path(__file__).parent.parent.parent


def skip(reason: str) -> None:
    print(f"skipped: {reason}")
    sys.exit(0)


def need_root() -> None:
    if os.geteuid():
        skip("needs root")


def need_programs(*names: str, install: str) -> None:
    if missing := [name for name in names if not shutil.which(name)]:
        skip(f"{', '.join(missing)} missing: apt-get install --no-install-recommends {install}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT leave the block quietly, whatever is set up in it taken down."""

    def leave(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # a shell has its background processes ignore SIGINT
        signal.signal(number, leave)
    with contextlib.suppress(KeyboardInterrupt):
        yield


# ------------------------------------------------------------------------------------------------ processes


def alive(pid: int) -> bool:
    """Whether this process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid: int) -> str:
    """A process's command line, its program first and without folders; empty once it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join([Path(words[0]).name, *words[1:]])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes() -> list[int]:
    return sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and alive(int(p.name)))


def environment_of(pid: int) -> list[str]:
    """A process's environment as NAME=VALUE; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def pythons(text: str) -> dict[int, str]:
    """Number -> command line of the living Python processes that have `text` in it, this one aside."""
    found = {pid: command_of(pid) for pid in processes() if pid != os.getpid()}
    return {pid: command for pid, command in found.items() if command.startswith("python") and text in command}


def ranks(out: Path) -> list[int]:
    """The training processes of the run that writes to `out`."""
    return [pid for pid, command in pythons(f"--output_dir {out}").items() if "distributed.run" not in command]


def agents(out: Path) -> list[int]:
    """Its torchruns."""
    return [pid for pid, command in pythons(f"--output_dir {out}").items() if "distributed.run" in command]


def wait_for(condition: Callable[[], object], seconds: float, what: str):
    """The first true value of `condition()`; RuntimeError if it has none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.1)
    return value


# ------------------------------------------------------------------------------------------------ the training


def make_world(folder: Path) -> Path:
    """The demo world: an untrained LLaMA of two million parameters and preference pairs."""
    if not folder.exists():
        demo.write_world(folder, seed=0)
    return folder


def training(world: Path, out: Path, steps: int, save_steps: int, **more) -> list[str]:
    """The script and its flags: a reward model, a line of output a step. `more`: further flags by name."""
    flags = {
        "model_name_or_path": world / "model",
        "dataset_path": world / "rm_train.jsonl",
        "output_dir": out,
        "max_steps": steps,
        "global_batch_size": 8,
        "learning_rate": 4e-4,
        "logging_steps": 1,
        "save_steps": save_steps,
        "save_total_limit": 3,
    }
    words = [(f"--{name}", str(value)) for name, value in (flags | more).items()]
    return [str(ROOT / "train_rm.py"), *(word for pair in words for word in pair)]


def two_processes(folder: Path, world: Path, steps: int, save_steps: int) -> str:
    """The final weights of an undisturbed training by two processes, without launchers."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *training(world, folder / "expected", steps, save_steps)]
    with open(folder / "expected.log", "w") as log:
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    return weights_hash(folder / "expected")


def weights_hash(out: Path) -> str:
    """Of the final model's tensors, as bytes in files."""
    digest = hashlib.sha256()
    for file in sorted((out / "model").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def marker(out: Path) -> dict:
    """exit.json, or {} where there is none."""
    try:
        return json.loads((out / "exit.json").read_text())
    except FileNotFoundError:
        return {}


def steps_said(log: str) -> list[int]:
    """The steps that a log tells of, in the order in which they were done; those done twice are there twice."""
    return [int(step) for step in re.findall(r"(?:^|\s)step (\d+)/\d+  (?!eval_)", log, re.MULTILINE)]


def repeats(steps: list[int]) -> list[int]:
    """How many steps were done again at each restart."""
    return [before - after + 1 for before, after in zip(steps, steps[1:], strict=False) if after <= before]


def machine() -> str:
    python, cores = platform.python_version(), os.cpu_count()
    return f"{cores} CPU cores, {platform.machine()}, Python {python}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------ scenarios


def scenario_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"{', '.join(names)}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that stays, to look into afterwards")


@contextlib.contextmanager
def scenarios(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of all files, gone at the end unless it is to be kept."""
    with interruptible():
        if args.keep:
            args.keep.mkdir(parents=True)
            yield args.keep.resolve()
        else:
            with tempfile.TemporaryDirectory(prefix="rm-cluster-") as folder:
                yield Path(folder)


def run_scenarios(laboratory, names: list[str], expected: str) -> None:
    """Print a row for each: a method of `laboratory` that returns a run with `out`, `began`, `steps()`, maybe `remark`.

    Args:
        expected: hash of the weights that each has to end with.
    """
    print(
        f"{machine()}\n\n| what happens | steps done again | final weights | seconds |\n|---|---|---|---|", flush=True
    )
    wrong = []
    for name in names:
        method, run = getattr(laboratory, name), None
        try:
            run = method()
            same = weights_hash(run.out) == expected
            again = ", ".join(map(str, repeats(run.steps()))) or "none"
            result = f"{again} | {'bit-equal' if same else 'DIFFERENT'} | {time.monotonic() - run.began:.0f}"
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            same, result = False, f"FAILED: {error}"
        wrong += [] if same else [name]
        print(f"| {method.__doc__}{getattr(run, 'remark', '')} | {result} |", flush=True)
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)
