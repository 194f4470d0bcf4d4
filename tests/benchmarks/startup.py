"""Time from `python train_rm.py` to the end of the first step, by stage, on a first start and on a second.

    python -m tests.benchmarks.startup --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/startup.md

Each start is a process of its own, with all of the data. The second finds the tokens in the cache. The functions that
the script calls are replaced by timed ones.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

# Nothing of rm is imported here, since its import is part of what the child process times.

FIRST_STEP, TOTAL = "first step", "total, to the end of the first step"
STAGES = {  # name -> the name by which train_rm.py calls it, in order
    "tokenizer": "Tokenizer",
    "data: read and tokenize, or open the cache": "dataset.load",
    "model: architecture": "build.build",
    "model: weights": "build.load",
    "optimizer": "optim.adamw",
    "look for a checkpoint": "resume.restore",
    FIRST_STEP: "train_step",
}


def main() -> None:
    from tests.benchmarks.common import Page, table

    args = arguments()
    page = Page("From the command to the first step", args)
    starts: dict[str, list[dict]] = {"first": [], "second": []}
    for turn in range(args.steps):
        with tempfile.TemporaryDirectory() as folder:
            for start in starts:
                starts[start].append(one(args, Path(folder), f"{turn}{start}"))
                print(f"{turn + 1}/{args.steps} {start}: {starts[start][-1]}", file=sys.stderr)
    rows = []
    for stage in starts["first"][0]:
        medians = [statistics.median(run[stage] for run in runs) for runs in starts.values()]
        rows.append([stage, *(f"{seconds:.2f}" for seconds in medians)])
    files = " ".join(Path(path).name for path in args.data)
    page.add(
        f"All pairs of {files}, {args.threads} threads, medians of {args.steps} starts each.\n",
        table(["seconds", "first start", "second start"], rows),
    )
    page.finish()


def one(args: Namespace, folder: Path, name: str) -> dict[str, float]:
    """Seconds of every stage of one start."""
    from tests.benchmarks import training

    words = training.our_flags(args, args.model, args.data[0], args.batch_pairs, 2, folder / name)
    words += ["--dataset_path", *args.data, "--cache_dir", str(folder / "cache")]
    code = f"from tests.benchmarks.startup import child; child({time.time()!r}, {json.dumps(words)})"
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(began: float, words: list[str]) -> None:
    """Run the main function of train_rm.py with a clock around what it calls; prints the seconds of every stage."""
    before = time.time()
    import train_rm
    from rm.config import parse
    from rm.distributed import process_group as dist

    seconds = {"Python": before - began, "import train_rm": time.time() - before}

    def timed(stage: str, call):
        def wrapped(*args, **named):
            start = time.time()
            result = call(*args, **named)
            if TOTAL not in seconds:
                seconds[stage] = time.time() - start
            if stage == FIRST_STEP:
                seconds.setdefault(TOTAL, time.time() - began)
            return result

        return wrapped

    for stage, path in STAGES.items():
        module, _, name = path.rpartition(".")
        owner = getattr(train_rm, module) if module else train_rm
        setattr(owner, name, timed(stage, getattr(owner, name)))
    settings = parse(train_rm.Settings, "", words)
    start = time.time()
    with dist.session(settings.run.seed):
        seconds["process group"] = time.time() - start
        train_rm.main(settings)
    print(json.dumps(seconds))


def arguments() -> Namespace:
    from tests.benchmarks.common import flags

    parser = flags(__doc__, steps=3)
    parser.add_argument("--batch_pairs", type=int, default=8, help="pairs a step (default: 8)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
