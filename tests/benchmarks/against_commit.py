"""CPU seconds of a training step, with the code of another commit and with this one.

    git worktree add /tmp/before COMMIT
    python -m tests.benchmarks.against_commit /tmp/before --model MODEL --data pairs.jsonl.gz

Each side runs its own train_rm.py or train_sft.py, in a process of its own; they take turns, step by step, on the same
batches, and the side that begins alternates. Ratios are this commit's CPU seconds over the other's, of the same step.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rm.data.encode import Task
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, table

ROOT = Path(__file__).parents[2]
LORA = "--use_lora true --lora_target_modules all-linear"
RUNS = {  # name -> (script, task, flags)
    "reward model, all weights": ("train_rm", Task.PREFERENCE, ""),
    "reward model, LoRA": ("train_rm", Task.PREFERENCE, LORA),
    "SFT, all weights": ("train_sft", Task.SFT, ""),
}


class StepByStep:
    """A side's own view of its turns, in place of `tests.benchmarks.turns.Turns`: a line asks for a step."""

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self.began = time.process_time()

    def end(self, loss: float, **_) -> None:
        print(json.dumps({"cpu": time.process_time() - self.began, "loss": loss}), file=sys.__stdout__, flush=True)


class Side:
    def __init__(self, repo: Path, script: str, words: list[str], threads: int):
        serve = f"import sys; sys.path.insert(0, {str(repo)!r}); sys.stdout = sys.stderr\n"
        serve += f"import importlib.util as u; s = u.spec_from_file_location('against', {__file__!r})\n"
        serve += "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        serve += f"m.training.ours(m.StepByStep(), {script!r}, {words!r})"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(repo)
        pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", serve], cwd=repo, env=environment, **pipe)

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side failed: see its traceback above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    args = arguments()
    page, rows = Page("A training step against another commit", args), []
    for name, (script, task, words) in RUNS.items():
        folder = Path(tempfile.mkdtemp())
        try:
            rows.append([name, *compare(args, script, task, words, folder)])
        finally:
            shutil.rmtree(folder)
        print(rows[-1], file=sys.stderr, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.before, capture_output=True, text=True)
    head = ["", f"{commit.stdout.strip()}, CPU s a step: median (min)", "this commit: median (min)",
            "ratio: median", "quartiles", "of the minima", "largest gap of the losses"]  # fmt: skip
    page.add(
        f"{args.batch_size} examples a step, float32, {args.warmup} warm-up and {args.steps} timed steps.\n",
        table(head, rows),
    )
    page.finish()


def compare(args, script: str, task: Task, words: str, folder: Path) -> list[str]:
    turns = args.warmup + args.steps
    file, _ = training.choose(args, args.model, args.batch_size, turns, task, folder)
    sides = []
    for number, repo in enumerate((args.before, ROOT)):
        out = folder / f"run{number}"
        given = training.our_flags(args, args.model, file, args.batch_size, turns + 2, out) + shlex.split(words)
        given += ["--cache_dir", str(folder / f"cache{number}")]
        sides.append(Side(repo.resolve(), script, given, args.threads))
    before, now = [], []
    for turn in range(turns):
        pair = list(zip(sides, (before, now), strict=True))
        for side, results in pair if turn % 2 else pair[::-1]:
            results.append(side.step())
    for side in sides:
        side.close()
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(before, now, strict=True))
    seconds = [[x["cpu"] for x in results[args.warmup :]] for results in (before, now)]
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in seconds]
    return [*cells, f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", f"{min(seconds[1]) / min(seconds[0]):.3f}",
            f"{gap:.0e}"]  # fmt: skip


def arguments():
    parser = flags(__doc__, steps=16)
    parser.add_argument("before", type=Path, help="a checkout of the other commit")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs or texts a step (default: 8)")
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    return args


if __name__ == "__main__":
    main()
