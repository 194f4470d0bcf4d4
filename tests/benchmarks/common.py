"""The flags that the benchmarks share, and the page with a benchmark's command, machine and results."""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks.turns import Contender

MIB = 2**20


def flags(doc: str, steps: int = 8) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder of a LLaMA-like model")
    add("--layers", type=int, help="keep only the model's first layers (for quick trials)")
    add("--data", nargs="+", required=True, help="files of preference pairs, full texts")
    add("--records", type=int, default=4000, help="records read from the files, in their order (default: 4000)")
    add("--max_length", type=int, default=512, help="leave out longer examples (default: 512)")
    add("--steps", type=int, default=steps, help=f"timed turns of each contender (default: {steps})")
    add("--warmup", type=int, default=1, help="turns before them that are not timed (default: 1)")
    add("--threads", type=int, default=2, help="torch threads of each contender (default: 2)")
    add("--seed", type=int, default=0)
    add("--ours", default="", help='more flags for our script, in one string, such as "--max_tokens 8192"')
    add("--out", help="also write the page to this file")
    return parser


def table(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def versus(ours: Contender, theirs: Contender, warmup: int, count: int, unit: str) -> str:
    """Time and memory of both sides, and their ratios; one turn computes `count` of `unit`."""
    rows = []
    for c in (ours, theirs):
        wall, cpu = c.of("wall", warmup), c.of("cpu", warmup)
        cells = [f"{statistics.median(x):.2f} ({min(x):.2f})" for x in (wall, cpu)]
        rate = count * len(wall) / sum(wall)
        rows.append([c.name, *cells, f"{rate:.2f}", *(f"{x / MIB:,.0f}" for x in (c.peak, c.allocated, c.loaded)),
                     f"{statistics.mean(c.of('others', warmup)):.2f}"])  # fmt: skip
    head = ["", "wall s a turn: median (min)", "CPU s a turn: median (min)", f"{unit}/s, all timed turns",
            "peak RSS above loaded, MiB", "allocator's peak in a turn, MiB", "RSS when loaded, MiB",
            "cores used by others"]  # fmt: skip
    ratios = []
    for clock in ("wall", "cpu"):
        our_seconds, their_seconds = ours.of(clock, warmup), theirs.of(clock, warmup)
        each = [b / a for a, b in zip(our_seconds, their_seconds, strict=True)]
        ratios.append([f"speed, {clock} seconds", f"**{statistics.median(each):.2f}**",
                       f"{min(each):.2f} to {max(each):.2f}",
                       f"{sum(their_seconds) / sum(our_seconds):.2f}"])  # fmt: skip
    memory = f"Memory, ours / theirs: peak RSS above loaded **{ours.peak / theirs.peak:.2f}**, " + (
        f"allocator's peak **{ours.allocated / theirs.allocated:.2f}**.\n"
    )
    ratio_head = ["theirs / ours", "median of the turns", "min to max", "of totals"]
    return "\n".join([table(head, rows), table(ratio_head, ratios), memory])


def side_by_side(ours: Contender, theirs: Contender, warmup: int) -> str:
    """Losses, computed tokens and time of every turn."""
    rows, gaps = [], []
    for i, (a, b) in enumerate(zip(ours.turns, theirs.turns, strict=True)):
        gaps.append(abs(a["loss"] - b["loss"]))
        rows.append([f"{i}{' (warm-up)' if i < warmup else ''}", f"{a['loss']:.6f}", f"{b['loss']:.6f}",
                     f"{gaps[-1]:.1e}", a["tokens"], b["tokens"], f"{b['tokens'] / a['tokens']:.2f}",
                     f"{a['wall']:.2f}", f"{b['wall']:.2f}", f"{b['wall'] / a['wall']:.2f}"])  # fmt: skip
    head = ["step", "loss, ours", "loss, theirs", "gap", "tokens computed, ours", "theirs, padding included",
            "ratio", "wall s, ours", "theirs", "ratio"]  # fmt: skip
    return table(head, rows) + f"\nLargest gap of the losses: {max(gaps):.1e}; of the first: {gaps[0]:.1e}.\n"


class Page:
    """A page of docs/benchmarks: the command, commit and machine, and then what is added to it."""

    def __init__(self, title: str, args: argparse.Namespace):
        self.title, self.out, self.parts, self.load = title, args.out, [], os.getloadavg()
        names = {args.model: Path(args.model).name} if getattr(args, "model", None) else {}
        names |= {p: "/".join(Path(p).parts[-2:]) for p in getattr(args, "data", None) or []}
        words = [names.get(word, word) for word in sys.argv[1:]]  # paths of this machine mean nothing elsewhere
        self.command = shlex.join(["python", "-m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *words])
        self.threads = args.threads

    def add(self, *parts: str) -> None:
        self.parts += parts

    def finish(self) -> None:
        cpu = next((x.split(":")[1].strip() for x in _run("lscpu").splitlines() if x.startswith("Model name")), "?")
        here = ["torch", "transformers", "trl", "peft", "accelerate"]
        loads = ["/".join(f"{x:.1f}" for x in load) for load in (self.load, os.getloadavg())]
        changed = " with uncommitted changes" if _run("git status --porcelain") else ""
        facts = [
            f"- {time.strftime('%Y-%m-%d %H:%M %z')}, commit {_run('git rev-parse --short HEAD')}{changed}",
            f"- {cpu}, {os.cpu_count()} cores, {self.threads} torch threads; load average (1/5/15 min) {loads[0]} at "
            f"the start, {loads[1]} at the end",
            f"- Python {sys.version.split()[0]}, " + ", ".join(f"{name} {_version(name)}" for name in here),
        ]
        text = "\n".join([f"# {self.title}\n", f"    {self.command}\n", *facts, "", *self.parts])
        print(text)
        if self.out:
            Path(self.out).parent.mkdir(parents=True, exist_ok=True)
            Path(self.out).write_text(text)


def _run(command: str) -> str:
    done = subprocess.run(shlex.split(command), cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
