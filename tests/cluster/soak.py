"""Train while random faults are injected, and compare with an undisturbed run.

    python -m tests.cluster.soak [--minutes 30] [--seed 0] [--out PAGE.md]

Small training runs follow each other, alternately with one process and with two under torchrun. Every few steps a
random fault is injected (the seed determines the draws but not the timing). A run that ends is restarted by the same
command. At the end of each run, its weights and the losses of all steps must be bit-identical to those of the
undisturbed run, no process may be left, and every repeated step must be explained (see `check_repeated_steps`).

The fault of a full disk uses a small tmpfs, which needs root; without root it is left out.
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
class FaultStatistics:
    """What was observed for one kind of fault."""

    times: int = 0
    repeated: list[int] = field(default_factory=list)  # steps that were repeated
    recovery: list[float] = field(default_factory=list)  # seconds until training continued
    exit: list[float] = field(default_factory=list)  # seconds from a stop signal until all processes had exited


EVENT = re.compile(
    r"(?:^|\s)step (\d+)/\d+ |no checkpoint of step (\d+):|a corrupt checkpoint: \S*?step_(\d+)", re.MULTILINE
)


def check_repeated_steps(output: str, damaged: set[int]) -> tuple[int, int]:
    """Check that every repeated step has a reason.

    A run resumes from its newest checkpoint. Each checkpoint that was due after that one must be either reported in
    `output` as not written, or reported as corrupt (and be in `damaged`), or be the last one, which was still being
    written.

    Returns:
        The number of restarts that repeated steps, and the highest number of steps that were lost because their
        checkpoint was still being written.

    Raises:
        AssertionError: a step was repeated without such a reason.
    """
    before, lost, restarts, in_flight = 0, set(), 0, 0
    for step, unwritten, corrupt in EVENT.findall(output):
        if unwritten:
            lost.add(int(unwritten))
        elif corrupt:
            assert int(corrupt) in damaged, f"checkpoint {corrupt} was skipped, but no fault has damaged it"
            lost.add(int(corrupt))
        else:
            if int(step) <= before:
                from_step, due = int(step) - 1, before // SAVE_STEPS * SAVE_STEPS
                missing = {n for n in range(SAVE_STEPS, due + 1, SAVE_STEPS) if n > from_step} - lost
                assert missing <= {due}, f"resumed from {from_step} after {before} without reason: {missing}"
                restarts, in_flight = restarts + 1, max(in_flight, before - due if missing else 0)
            if int(step) != before + 1:
                lost = set()
            before = int(step)
    return restarts, in_flight


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, open(out / "metrics.jsonl"))}


def disturb(run: Run, fault: Callable, statistics: FaultStatistics) -> None:
    """Inject a fault and wait until the run does steps again; restart the run if it has ended."""
    done, began = len(run.steps()), time.monotonic()
    exit_seconds = fault(run)
    statistics.times += 1
    if exit_seconds is not None:
        statistics.exit.append(exit_seconds)
    if not run.after_steps(3) and not run.finished():
        run.restart()
        run.after_steps(1)
    statistics.recovery.append(time.monotonic() - began)
    statistics.repeated.append(sum(lab.repeats(run.steps()[max(0, done - 1) :])))


def one_run(run: Run, possible: list[Callable], table: dict[str, FaultStatistics]) -> None:
    """Train from the first step to the last, with a fault every few steps."""
    run.start()
    while not run.finished():
        if run.after_steps(run.rng.randint(3, 35)):
            fault = run.rng.choice([f for f in possible if run.processes > 1 or f not in faults.NEED_TWO_PROCESSES])
            print(f"  after step {(run.steps() or [0])[-1]}: {fault.__doc__}", flush=True)
            disturb(run, fault, table[fault.__doc__])
        elif not run.finished():
            run.restart()


def check(run: Run, expected: Path, disk_was_full: bool) -> tuple[int, int]:
    """Check a finished run against the undisturbed one (AssertionError); returns what `check_repeated_steps` does."""
    assert not lab.ranks(run.out), "processes are left"
    assert not list(run.out.glob("checkpoints/.step_*")), "partly written checkpoints are left"
    assert lab.weights_hash(run.out) == lab.weights_hash(expected), "the weights differ"
    actual_losses, expected_losses = losses(run.out), losses(expected)
    # A step may be missing from metrics.jsonl only if the disk was full.
    differ = [step for step, loss in expected_losses.items() if actual_losses.get(step, loss) != loss]
    assert not differ, f"the losses of the steps {differ} differ"
    assert disk_was_full or len(actual_losses) == len(expected_losses), "lines of metrics are missing"
    return check_repeated_steps(run.output(), run.damaged)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs on a new folder; yields whether this was possible."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "soak", folder]).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder])


def undisturbed(folder: Path, world: Path, processes: int) -> Path:
    """Train without faults; returns the output folder."""
    name = f"undisturbed_{processes}"
    run = Run(folder / name, folder / f"{name}.log", world, processes, random.Random(0))
    run.start()
    assert run.launcher.wait() == 0, run.output()
    return run.out


def soak(folder: Path, minutes: float, seed: int) -> list[str]:
    """Run the test for `minutes`; returns the lines of the report."""
    rng, world, table, rows = random.Random(seed), lab.make_world(folder / "world"), defaultdict(FaultStatistics), []
    expected = {processes: undisturbed(folder, world, processes) for processes in (1, 2)}
    began = time.monotonic()
    with disk(folder / "disk") as small, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: report the finished runs
        possible = [f for f in faults.FAULTS if small or f is not faults.fill_disk]
        while time.monotonic() < began + 60 * minutes:
            number, processes = len(rows) + 1, 2 - len(rows) % 2
            files = folder / "disk" / str(number), folder / f"{number}.log"  # the log is not on the small disk
            run, start = Run(*files, world, processes, rng), time.monotonic()
            print(f"training {number}, {processes} processes", flush=True)
            try:
                one_run(run, possible, table)
                restarts, in_flight = check(run, expected[processes], disk_was_full=small)
            finally:
                run.kill_all()
            weights, repeated = lab.weights_hash(run.out), sum(lab.repeats(run.steps()))
            seconds = f"{time.monotonic() - start:.0f}"
            rows.append(row(number, processes, restarts, repeated, in_flight, weights, seconds))
            shutil.rmtree(run.out)
    return page(table, rows, (time.monotonic() - began) / 60)


def row(*cells) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def page(table: dict[str, FaultStatistics], rows: list[str], minutes: float) -> list[str]:
    """The lines of the report: a summary, a table of faults and a table of training runs."""

    def highest(values: list) -> str:
        return f"{max(values):.0f}" if values else ""

    fault_rows = []
    for fault, seen in table.items():
        maxima = highest(seen.repeated), highest(seen.recovery), highest(seen.exit)
        fault_rows.append(row(fault, seen.times, sum(seen.repeated), *maxima))
    count = sum(seen.times for seen in table.values())
    return [
        f"{lab.machine()}. {len(rows)} training runs of {STEPS} steps with a checkpoint every {SAVE_STEPS}; "
        f"{minutes:.0f} minutes; {count} faults. The weights of all runs and the losses of all their steps are "
        "bit-identical to those of the undisturbed runs.",
        "",
        "| fault | times | repeated steps, total | maximum | seconds until training continued, maximum | "
        "seconds to exit, maximum |",
        "|---|---|---|---|---|---|",
        *fault_rows,
        "",
        "| run | processes | restarts that repeated steps | repeated steps | "
        "of these, done while a checkpoint was being written, maximum | weights | seconds |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="no training run starts after this time (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the faults (default 0)")
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="also write the tables to this file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for all files, which is kept")
    args = parser.parse_args()
    with lab.scenarios(args) as folder:
        lines = soak(folder, args.minutes, args.seed)
        print("\n" + "\n".join(lines))
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
