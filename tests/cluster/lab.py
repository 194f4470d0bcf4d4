"""Helpers of the cluster tests: requirements, processes, a small training run and its results, tables of scenarios."""

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
    """End this test with status 0."""
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
    """SIGTERM and SIGINT end the block silently; context managers inside it clean up as usual."""

    def leave(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # the shell makes background processes ignore SIGINT
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
    """The command line of a process, with the program's name instead of its path; empty if the process is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join([Path(words[0]).name, *words[1:]])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes() -> list[int]:
    """The ids of all living processes."""
    return sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and alive(int(p.name)))


def environment_of(pid: int) -> list[str]:
    """The environment of a process as NAME=VALUE strings; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def python_processes(text: str) -> dict[int, str]:
    """Process id -> command line of all other living Python processes whose command line contains `text`."""
    commands = {pid: command_of(pid) for pid in processes() if pid != os.getpid()}
    return {pid: command for pid, command in commands.items() if command.startswith("python") and text in command}


def ranks(out: Path) -> list[int]:
    """The ids of the training processes (ranks) of the run that writes to `out`."""
    return [pid for pid, command in python_processes(f"--output_dir {out}").items() if "distributed.run" not in command]


def agents(out: Path) -> list[int]:
    """The ids of the torchrun processes of the run that writes to `out`."""
    return [pid for pid, command in python_processes(f"--output_dir {out}").items() if "distributed.run" in command]


def wait_for(condition: Callable[[], object], seconds: float, what: str):
    """Wait until `condition()` is true and return its value.

    Raises:
        RuntimeError: this did not happen within `seconds`; the message contains `what`.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.1)
    return value


# ------------------------------------------------------------------------------------------------ the training


def make_world(folder: Path) -> Path:
    """The data of rm/demo.py: preference pairs and an untrained LLaMA with two million parameters."""
    if not folder.exists():
        demo.write_world(folder, seed=0)
    return folder


def training(world: Path, out: Path, steps: int, save_steps: int, **more_flags) -> list[str]:
    """The script that trains a reward model and its flags; it prints one line per step."""
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
    words = [(f"--{name}", str(value)) for name, value in (flags | more_flags).items()]
    return [str(ROOT / "train_rm.py"), *(word for pair in words for word in pair)]


def two_processes(folder: Path, world: Path, steps: int, save_steps: int) -> str:
    """The hash of the final weights of an undisturbed training run with two processes, without a launcher."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *training(world, folder / "expected", steps, save_steps)]
    with open(folder / "expected.log", "w") as log:
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    return weights_hash(folder / "expected")


def weights_hash(out: Path) -> str:
    """A hash of the final model's weight files."""
    digest = hashlib.sha256()
    for file in sorted((out / "model").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read_exit_json(out: Path) -> dict:
    """The content of exit.json, or {} if it does not exist."""
    try:
        return json.loads((out / "exit.json").read_text())
    except FileNotFoundError:
        return {}


def logged_steps(log: str) -> list[int]:
    """The training steps in a log, in the order in which they were done; repeated steps are listed repeatedly."""
    return [int(step) for step in re.findall(r"(?:^|\s)step (\d+)/\d+  (?!eval_)", log, re.MULTILINE)]


def repeats(steps: list[int]) -> list[int]:
    """How many steps were repeated at each restart that repeated any."""
    return [before - after + 1 for before, after in zip(steps, steps[1:], strict=False) if after <= before]


def machine() -> str:
    python, cores = platform.python_version(), os.cpu_count()
    return f"{cores} CPU cores, {platform.machine()}, Python {python}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------ scenarios


def scenario_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"{', '.join(names)}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for all files, which is kept")


@contextlib.contextmanager
def scenarios(args: argparse.Namespace) -> Iterator[Path]:
    """A folder for all files, which is removed at the end unless --keep names one."""
    with interruptible():
        if args.keep:
            args.keep.mkdir(parents=True)
            yield args.keep.resolve()
        else:
            with tempfile.TemporaryDirectory(prefix="rm-cluster-") as folder:
                yield Path(folder)


def run_scenarios(laboratory, names: list[str], expected: str) -> None:
    """Run scenarios, print a table row for each, and exit with status 1 if any failed.

    Args:
        laboratory: has a method per scenario, whose docstring describes it. The method returns a run with `out`,
            `began`, `steps()` and, optionally, `remark`.
        names: the scenarios to run.
        expected: hash of the final weights (`weights_hash`) that each of them must have.
    """
    print(f"{machine()}\n\n| what happens | repeated steps | final weights | seconds |\n|---|---|---|---|", flush=True)
    failed = []
    for name in names:
        method, run = getattr(laboratory, name), None
        try:
            run = method()
            passed = weights_hash(run.out) == expected
            repeated = ", ".join(map(str, repeats(run.steps()))) or "none"
            weights = "bit-identical" if passed else "DIFFERENT"
            result = f"{repeated} | {weights} | {time.monotonic() - run.began:.0f}"
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            passed, result = False, f"FAILED: {error}"
        if not passed:
            failed.append(name)
        print(f"| {method.__doc__}{getattr(run, 'remark', '')} | {result} |", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
