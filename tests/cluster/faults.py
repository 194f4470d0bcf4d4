"""A training that is started again and again, and what can happen to it: the faults of the soak."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import lab

STEPS, SAVE_STEPS = 200, 10
STALL = 15  # --stall_timeout
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PATIENCE = 180  # seconds until a disturbed run has ended or does steps again


class Run:
    """One training, however often it is started."""

    def __init__(self, out: Path, log: Path, world: Path, processes: int, rng: random.Random):
        self.out, self.log, self.rng, self.processes = out, log, rng, processes
        self.harmed: set[int] = set()  # steps whose checkpoints were damaged here
        self.flags = lab.training(world, self.out, STEPS, SAVE_STEPS, stall_timeout=STALL)
        self.launcher: subprocess.Popen | None = None

    def start(self) -> None:
        torchrun = (
            f'source launch/torchrun.sh && exec "${{torchrun[@]}}" --standalone --nproc-per-node {self.processes}'
        )
        command = ["bash", "-c", f'{torchrun} "$@"', "bash"] if self.processes > 1 else [sys.executable]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": PATH}
        with open(self.log, "a") as log:
            self.launcher = subprocess.Popen(
                [*command, *self.flags], cwd=lab.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def running(self) -> bool:
        return self.launcher is not None and self.launcher.poll() is None

    def start_again(self) -> None:
        lab.wait_for(lambda: not lab.ranks(self.out), 60, "all its processes have ended")
        self.start()

    def finished(self) -> bool:
        return not self.running() and lab.marker(self.out).get("status") == "finished"

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> list[int]:
        return lab.steps_said(self.said())

    def after_steps(self, count: int) -> bool:
        """Wait until `count` more steps are done; False if it ended before."""
        done = len(self.steps()) + count
        lab.wait_for(lambda: not self.running() or len(self.steps()) >= done, PATIENCE, f"{count} steps; {self.log}")
        return self.running()

    def newest(self) -> list[Path]:
        """Its checkpoints, the newest first."""
        found = [f for f in self.out.glob("checkpoints/step_*") if f.name[5:].isdecimal()]
        return sorted(found, key=lambda f: -int(f.name[5:]))

    def good(self) -> list[int]:
        """The steps of those that were not damaged here."""
        return [step for folder in self.newest() if (step := int(folder.name[5:])) not in self.harmed]

    def one_rank(self) -> list[int]:
        """Of its processes one, if any is left."""
        return self.rng.sample(ranks := lab.ranks(self.out), k=min(1, len(ranks)))

    def send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        self.send(signal.SIGKILL, lab.ranks(self.out))
        self.launcher.kill()  # last, since its end would warn the others
        self.launcher.wait()


# The faults. What each is, the first line of its docstring says; a number that it returns is seconds.


def kill_one(run: Run) -> None:
    """kill -9 of one process"""
    run.send(signal.SIGKILL, run.one_rank())


def kill_everything(run: Run) -> None:
    """kill -9 of everything at once, as in a power cut"""
    run.kill_all()


def kill_in_save(run: Run) -> None:
    """kill -9 of everything while a checkpoint is written"""
    hidden = run.out / "checkpoints"
    end = time.monotonic() + 30
    while run.running() and time.monotonic() < end and not any(hidden.glob(".step_*")):
        time.sleep(0.002)
    time.sleep(run.rng.random() * 0.1)
    run.kill_all()


def kill_in_start(run: Run) -> None:
    """kill -9 of everything while it starts"""
    run.kill_all()
    run.start()
    time.sleep(run.rng.uniform(0.1, 8))
    run.kill_all()


def kill_launcher(run: Run) -> None:
    """kill -9 of torchrun alone"""
    run.launcher.kill()
    lab.wait_for(lambda: not lab.ranks(run.out), 60, "the processes that torchrun left behind have ended")


def stop(run: Run) -> float:
    """SIGTERM, SIGINT or SIGUSR1 to the launcher, once or several times"""
    number = run.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    began = time.monotonic()
    for _ in range(run.rng.choice((1, 1, 3))):
        run.launcher.send_signal(number)  # none if it has ended
        time.sleep(run.rng.random() / 2)
    run.launcher.wait(30)
    lab.wait_for(lambda: not lab.ranks(run.out), 30, "no process is left after a stop")  # they may outlive torchrun
    return time.monotonic() - began


def stop_one(run: Run) -> None:
    """SIGTERM to one process only"""
    run.send(signal.SIGTERM, run.one_rank())


def hang_one(run: Run) -> None:
    """one process hangs for good (SIGSTOP)"""
    run.send(signal.SIGSTOP, run.one_rank())


def pause(run: Run) -> None:
    """everything stands still for 5 or 20 s (SIGSTOP, SIGCONT), the watchdog's limit being 15"""
    pids = lab.ranks(run.out)
    run.send(signal.SIGSTOP, pids)
    time.sleep(run.rng.choice((5, 20)))
    run.send(signal.SIGCONT, pids)


def harm(run: Run) -> None:
    """a bit of the newest checkpoint flips, or a file of it is cut, emptied or lost; then a power cut"""
    run.kill_all()
    newest = run.newest()[:1]
    # Where none is good any more a run says so and ends: whether to begin anew is for a person to decide.
    if newest and set(run.good()) - {step := int(newest[0].name[5:])}:
        run.harmed.add(step)
        file = run.rng.choice(sorted(f for f in newest[0].iterdir() if f.stat().st_size))
        content = bytearray(file.read_bytes())
        how = run.rng.choice(("flip", "flip", "cut", "empty", "lose"))
        if how == "flip":
            content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
        file.write_bytes(
            content if how == "flip" else content[: run.rng.randrange(len(content))] if how == "cut" else b""
        )
        if how == "lose":
            file.unlink()


def half_written(run: Run) -> None:
    """a power cut leaves half a checkpoint of a later step, hidden and with a name, and half a line of metrics"""
    run.kill_all()
    for name in (".step_190.dead", *["step_195"] * bool(run.good())):  # as in `harm`
        (run.out / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (run.out / "checkpoints" / name / "rank_00000.safetensors").write_bytes(run.rng.randbytes(1000))
    run.harmed.add(195)
    if (run.out / "metrics.jsonl").exists():
        with open(run.out / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step": 1')


def fill_disk(run: Run) -> None:
    """the disk is full, for one checkpoint or until the run gives up"""
    filler = run.out.parent / "filler"
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    failures = run.said().count("no checkpoint of step")
    enough = run.rng.choice((1, 2))
    lab.wait_for(
        lambda: not run.running() or run.said().count("no checkpoint of step") >= failures + enough, 60, "it is noticed"
    )
    if enough == 2:
        with contextlib.suppress(RuntimeError):
            lab.wait_for(lambda: not run.running(), 20, "it has given up")
    filler.unlink()


FAULTS = (
    kill_one, kill_everything, kill_in_save, kill_in_start, kill_launcher, stop, stop, stop_one, hang_one, pause, harm,
    harm, half_written, fill_disk,
)  # fmt: skip
OF_TWO = (kill_launcher, hang_one)  # need a second process that notices
