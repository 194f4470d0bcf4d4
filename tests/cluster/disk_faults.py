"""A full disk, a failing one and SIGKILL at each operation on files that a command makes; then the same command again.

    python -m tests.cluster.disk_faults                                every point of every command: hours
    python -m tests.cluster.disk_faults --minutes 30 --commands train  as many as there is time for, drawn at random
    python -m tests.cluster.disk_faults --commands evaluate --points 77 78    these, of one command
    python -m tests.cluster.disk_faults --commands evaluate --again           in the folder of an earlier one
    python -m tests.cluster.disk_faults --faults kill --processes 2    of two processes, the first is killed

Points are counted by a library that is loaded before libc (disk_faults.c, which needs a C compiler, on Linux). At each:

    full     this operation and all that follow fail with ENOSPC
    broken   this one fails with EIO
    kill     the process is killed before it

A command whose disk fails ends with status 0, having said what failed, or with status 2 and one line; never with a
traceback. The same command again, on a disk that works, ends with status 0 and leaves what an undisturbed one leaves:
the same files, weights to the bit, metrics but for times. Prints how many points were tried, and each bad one.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FAULTS = {"full": 1, "broken": 2, "kill": 3}
LIBRARY = "RM_DISK_FAULTS"  # environment variable: the compiled library
TIMES = ("second", "memory", "time", "started", "pid", "command", "output_dir", "cache_dir", "starts", "git_commit")


def compiled(folder: Path) -> Path:
    library = folder / "disk_faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "disk_faults.c", "-ldl"], check=True)
    return library


def restart_with_library(folder: Path) -> None:
    """Start this process again with the library before libc."""
    library = str(compiled(folder))
    environment = os.environ | {"LD_PRELOAD": library, LIBRARY: library}
    os.execve(sys.executable, [sys.executable, "-m", "tests.cluster.disk_faults", *sys.argv[1:]], environment)


def commands_of(world: Path, here: Path) -> dict[str, tuple[str, list]]:
    """Name -> (program, its arguments), of commands that write to `here` only."""
    cache = ["--cache_dir", here / "cache"]
    of_training = [
        "--model_name_or_path", world / "base", "--dataset_path", world / "pairs.json", "--output_dir", here / "out",
        "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--global_batch_size", 4, "--max_tokens", 200,
        "--validation_split_percentage", 20, *cache,
    ]  # fmt: skip
    model = ["--model_name_or_path", world / "trained/model"]
    texts = ["--dataset_path", world / "texts.json"]
    return {
        "train": ("train_rm.py", of_training),
        "lora": ("train_rm.py", [*of_training, "--use_lora", "true", "--lora_r", 2]),
        "sft": ("train_sft.py", [*of_training, *texts]),
        "evaluate": ("eval_rm.py", [*model, *of_training[2:6], *cache]),
        "score": (
            "eval_rm.py", [*model, *of_training[2:6], *cache, "--score_only", "true", "--best_of_n", "true"]
        ),
        "export": ("rm.export", [*model, "--output_dir", here / "out"]),
        "prepare": ("rm.prepare_hh", [world / "pairs.json", "--output_dir", here / "out", "--sft", 3, "--rm", "all"]),
        "audit": ("rm.audit", [world / "pairs.json", "--json", here / "audit.json", "--fail_on", "never"]),
    }  # fmt: skip


def make_world(world: Path) -> None:
    from tests import commands, text_fixtures, tiny

    text_fixtures.byte_level(world / "base")
    tiny.llama(vocab_size=400).save_pretrained(world / "base")
    texts = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}." for a in range(4) for b in range(3)]
    pairs = [{"positive": text, "negative": text[:-3] + "no."} for text in texts]
    (world / "pairs.json").write_text(json.dumps(pairs))
    (world / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    program, words = commands_of(world, world / "made")["train"]
    done = commands.run(program, *words, timeout=600)
    assert done.returncode == 0, done.stderr
    (world / "made/out").rename(world / "trained")


def run(program: str, words: list, fault: int, point: int, here: Path, processes: int = 0):
    """(the finished process, operations that it counted)"""
    from tests import commands

    here.mkdir(exist_ok=True)
    shim, count = ctypes.CDLL(os.environ[LIBRARY]), here.parent / "count"

    def armed() -> None:
        import runpy

        from rm.report import html

        html.figures = lambda *_: ""  # to draw them takes longer than all the rest
        is_first = os.environ.get("RANK", "0") == "0"
        shim.arm(fault if is_first else 0, ctypes.c_long(point), str(here).encode())
        sys.argv = [program, *map(str, words)]
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        finally:
            if is_first:
                count.write_text(str(shim.counted()))

    done = commands.call(armed, processes=processes, timeout=600)
    return done, int(count.read_text())


def outcome(here: Path) -> dict[str, object]:
    """File -> what it holds, but for what differs from run to run."""
    found: dict[str, object] = {}
    for file in sorted(file for file in here.rglob("*") if file.is_file()):
        name, content = str(file.relative_to(here)), file.read_bytes()
        if name.startswith("cache/"):
            continue
        if file.suffix == ".jsonl" and file.name == "metrics.jsonl":
            found[name] = [_repeatable(json.loads(line)) for line in content.splitlines()]
        elif file.suffix in (".html", ".csv", ".md") or file.name in ("exit.json", "COMPLETE"):
            found[name] = "there"
        elif file.suffix == ".json":
            found[name] = _repeatable(json.loads(content))
        else:
            found[name] = content
    entries = [folder.name for folder in (here / "cache").glob("*") if not folder.name.startswith("writing-")]
    return found | {"cache": sorted(entries)}


def _repeatable(value):
    if isinstance(value, dict):
        return {k: _repeatable(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return value


def problem(fault: str, first, again, want: dict, got: dict) -> str | None:
    """What is wrong with a disturbed command and the one after it."""
    said = first.stdout + first.stderr
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1]}"
    if fault != "kill":
        if first.returncode not in (0, 2):
            return f"status {first.returncode}: {said.strip()[-200:]}"
        if "space left" not in said and "put/output error" not in said and first.returncode:
            return f"does not say what failed: {said.strip().splitlines()[-1][-200:]}"
    if again.returncode:
        return f"again: status {again.returncode}: {again.stderr.strip()[-200:]}"
    for name in want.keys() | got.keys():
        # A training goes on without one checkpoint, as it says.
        if want.get(name) != got.get(name) and not (name.startswith("out/checkpoints/") and not first.returncode):
            what = "missing" if name not in got else "left over" if name not in want else "another one"
            return f"again: {name}: {what}"
    return None


def bad_points(args: argparse.Namespace, top: Path, tried: Counter) -> Iterator[str]:
    """A line for each. `tried`: is counted up."""
    import eval_rm, rm.audit.__main__, rm.export, rm.prepare_hh, torch._dynamo, train_rm, train_sft  # fmt: skip # noqa: E401, F401, I001

    world, here, before = top / "world", top / "here", top / "before"
    make_world(world)
    for name in args.commands:
        program, words = commands_of(world, here)[name]
        before.mkdir()
        for _ in range(1 + args.again):
            done, points = run(program, words, 0, 0, here, args.processes)
            assert done.returncode == 0, done.stderr
            if args.again:
                shutil.copytree(here, before, dirs_exist_ok=True)
        want, end = outcome(here), time.monotonic() + 60 * args.minutes / len(args.commands)
        shutil.rmtree(here)
        print(f"{name}: {points} points", flush=True)
        for point in args.points or random.Random(0).sample(range(1, points + 1), points):
            for fault in args.faults:
                if time.monotonic() > end:
                    break
                shutil.copytree(before, here)
                first, _ = run(program, words, FAULTS[fault], point, here, args.processes)
                is_whole = not first.returncode and outcome(here) == want  # what follows is known
                again = first if is_whole else run(program, words, 0, 0, here, args.processes)[0]
                tried[f"{name} {fault}"] += 1
                if found := problem(fault, first, again, want, outcome(here)):
                    yield f"{name}, {fault} at {point} of {points}: {found}"
                shutil.rmtree(here)
        shutil.rmtree(before)


def main() -> None:
    names, faults = ["train", "lora", "sft", "evaluate", "score", "export", "prepare", "audit"], list(FAULTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=names, default=names)
    parser.add_argument("--faults", nargs="+", choices=faults, default=faults)
    parser.add_argument("--points", nargs="+", type=int, default=[], help="default: all")
    parser.add_argument("--again", action="store_true", help="each in the folder of an earlier, finished one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="an equal part of it for each command")
    parser.add_argument("--processes", type=int, default=0, help="of a process group (default: none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disk-faults-") as top:
        if LIBRARY not in os.environ:
            restart_with_library(Path(tempfile.mkdtemp(prefix="disk-faults-library-")))
        tried: Counter = Counter()
        bad = 0
        for line in bad_points(args, Path(top), tried):
            bad += 1
            print(line, flush=True)
    print(", ".join(f"{name}: {count}" for name, count in tried.items()))
    print(f"{tried.total():,} points tried, bad: {bad}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
