"""Train while everything goes wrong, for as long as you like, and compare with a run that was left alone.

    python -m tests.cluster.soak [--minutes 30] [--seed 0] [--out PAGE.md]

One small training after the other, by turns in one process and in two under torchrun, each disturbed every few steps
by a fault drawn at random (the seed repeats the draws, not the clock). Whatever ends is started again by the same
command. At the end of each the weights and the losses of all steps must be bit-equal to the undisturbed run's, no
process may be left, and every step that was done twice must be accounted for (see `account`).

Root is needed for a full disk, which is a small tmpfs; without it that fault is left out.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import faults, lab
from tests.cluster.faults import SAVE_STEPS, STEPS, Run

DISK = 300  # MB: a few checkpoints of 23 MB each


@dataclass
class Seen:
    """Of one kind of fault."""

    times: int = 0
    repeated: list[int] = field(default_factory=list)  # steps done again
    back: list[float] = field(default_factory=list)  # seconds until it trained again
    left: list[float] = field(default_factory=list)  # seconds from a signal until all had left


EVENT = re.compile(r"(?:^|\s)step (\d+)/\d+ |no checkpoint of step (\d+):|passed over: \S*?step_(\d+)", re.MULTILINE)


def account(said: str, harmed: set[int]) -> tuple[int, int]:
    """(restarts that did steps again, the most steps that were done while a checkpoint was being written and so lost).

    A run goes on from its newest checkpoint. Of the checkpoints that were due since then each must be one that the log
    says could not be written, or was found damaged (and was damaged here), or the last, which was still being written.
    AssertionError otherwise.
    """
    before, lost, restarts, in_flight = 0, set(), 0, 0
    for step, unwritten, damaged in EVENT.findall(said):
        if unwritten:
            lost.add(int(unwritten))
        elif damaged:
            assert int(damaged) in harmed, f"checkpoint {damaged} was passed over, but not damaged"
            lost.add(int(damaged))
        else:
            if int(step) <= before:
                from_step, due = int(step) - 1, before // SAVE_STEPS * SAVE_STEPS
                missing = {n for n in range(SAVE_STEPS, due + 1, SAVE_STEPS) if n > from_step} - lost
                assert missing <= {due}, f"went on from {from_step} after {before}, without reason: {missing}"
                restarts, in_flight = restarts + 1, max(in_flight, before - due if missing else 0)
            if int(step) != before + 1:
                lost = set()
            before = int(step)
    return restarts, in_flight


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, open(out / "metrics.jsonl"))}


def disturb(run: Run, fault: Callable, seen: Seen) -> None:
    """One fault, and the run until it does steps again, started again if it has ended."""
    done, began = len(run.steps()), time.monotonic()
    left = fault(run)
    seen.times += 1
    if left is not None:
        seen.left.append(left)
    if not run.after_steps(3) and not run.finished():
        run.start_again()
        run.after_steps(1)
    seen.back.append(time.monotonic() - began)
    seen.repeated.append(sum(lab.repeats(run.steps()[max(0, done - 1) :])))


def one_run(run: Run, possible: list[Callable], table: dict[str, Seen]) -> None:
    """From the first step to the last, disturbed every few steps."""
    run.start()
    while not run.finished():
        if run.after_steps(run.rng.randint(3, 35)):
            fault = run.rng.choice([f for f in possible if run.processes > 1 or f not in faults.OF_TWO])
            print(f"  after step {(run.steps() or [0])[-1]}: {fault.__doc__}", flush=True)
            disturb(run, fault, table[fault.__doc__])
        elif not run.finished():
            run.start_again()


def check(run: Run, expected: Path, disk_was_full: bool) -> tuple[int, int]:
    """That a disturbed run is the undisturbed one; what `account` says of it. AssertionError otherwise."""
    assert not lab.ranks(run.out), "processes are left"
    assert not list(run.out.glob("checkpoints/.step_*")), "half-written checkpoints are left"
    assert lab.weights_hash(run.out) == lab.weights_hash(expected), "the weights differ"
    here, there = losses(run.out), losses(expected)
    differ = [step for step in there if here.get(step, there[step]) != there[step]]
    assert not differ, f"the losses of the steps {differ} differ"
    assert disk_was_full or len(here) == len(there), "lines of metrics are missing"
    return account(run.said(), run.harmed)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Make the folder a small disk of its own; whether that can be done here."""
    folder.mkdir()
    done = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "soak", folder]).returncode == 0
    )
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", folder])


def undisturbed(folder: Path, world: Path, processes: int) -> Path:
    """The output of a run that is left alone."""
    name = f"undisturbed_{processes}"
    run = Run(folder / name, folder / f"{name}.log", world, processes, random.Random(0))
    run.start()
    assert run.launcher.wait() == 0, run.said()
    return run.out


def soak(folder: Path, minutes: float, seed: int) -> list[str]:
    """The page's lines."""
    rng, world, table, rows = random.Random(seed), lab.make_world(folder / "world"), defaultdict(Seen), []
    expected = {processes: undisturbed(folder, world, processes) for processes in (1, 2)}
    began = time.monotonic()
    with disk(folder / "disk") as small, contextlib.suppress(KeyboardInterrupt):  # what is finished is told
        possible = [f for f in faults.FAULTS if small or f is not faults.fill_disk]
        while time.monotonic() < began + 60 * minutes:
            number, processes = len(rows) + 1, 2 - len(rows) % 2
            files = folder / "disk" / str(number), folder / f"{number}.log"  # the log is not on the disk that fills
            run, start = Run(*files, world, processes, rng), time.monotonic()
            print(f"training {number}, {processes} processes", flush=True)
            try:
                one_run(run, possible, table)
                restarts, in_flight = check(run, expected[processes], disk_was_full=small)
            finally:
                run.kill_all()
            hashed, again = lab.weights_hash(run.out), sum(lab.repeats(run.steps()))
            seconds = f"{time.monotonic() - start:.0f}"
            rows.append(row(number, processes, restarts, again, in_flight, hashed, seconds))
            shutil.rmtree(run.out)
    return page(table, rows, (time.monotonic() - began) / 60)


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def page(table: dict[str, Seen], rows: list[str], minutes: float) -> list[str]:
    def most(numbers: list) -> str:
        return f"{max(numbers):.0f}" if numbers else ""

    kinds = []
    for kind, seen in table.items():
        cells = (kind, seen.times, sum(seen.repeated), most(seen.repeated), most(seen.back), most(seen.left))
        kinds.append(row(*cells))
    count = sum(seen.times for seen in table.values())
    return [
        f"{lab.machine()}. {len(rows)} trainings of {STEPS} steps, a checkpoint every {SAVE_STEPS}; {minutes:.0f} "
        f"minutes; {count} faults. The weights of all trainings and the losses of all their steps are bit-equal to "
        "those of the undisturbed runs.",
        "",
        "| fault | times | steps done again, all | at most | seconds until it trained again, at most | to leave |",
        "|---|---|---|---|---|---|",
        *kinds,
        "",
        "| training | processes | restarts with steps done again | steps done again | of them while a checkpoint was "
        "written, at most | weights | seconds |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="no training begins later (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default 0)")
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="write the tables here too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that stays, to look into afterwards")
    args = parser.parse_args()
    with lab.scenarios(args) as folder:
        lines = soak(folder, args.minutes, args.seed)
        print("\n" + "\n".join(lines))
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
