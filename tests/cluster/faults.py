"""A training run that is restarted repeatedly, and the faults that tests/cluster/soak.py injects into it."""

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
TIMEOUT = 180  # seconds within which a disturbed run must have ended or do steps again


class Run:
    """One training run over all its restarts."""

    def __init__(self, out: Path, log: Path, world: Path, processes: int, rng: random.Random):
        self.out, self.log, self.rng, self.processes = out, log, rng, processes
        self.damaged: set[int] = set()  # steps whose checkpoints a fault has damaged
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

    def restart(self) -> None:
        lab.wait_for(lambda: not lab.ranks(self.out), 60, "all its processes have ended")
        self.start()

    def finished(self) -> bool:
        return not self.running() and lab.read_exit_json(self.out).get("status") == "finished"

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> list[int]:
        return lab.logged_steps(self.output())

    def after_steps(self, count: int) -> bool:
        """Wait until `count` more steps are done; returns False if the run ended before."""
        done = len(self.steps()) + count
        lab.wait_for(lambda: not self.running() or len(self.steps()) >= done, TIMEOUT, f"{count} steps; {self.log}")
        return self.running()

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first."""
        folders = [f for f in self.out.glob("checkpoints/step_*") if f.name[5:].isdecimal()]
        return sorted(folders, key=lambda f: -int(f.name[5:]))

    def intact(self) -> list[int]:
        """The steps of the checkpoints that no fault has damaged, newest first."""
        steps = [int(folder.name[5:]) for folder in self.checkpoints()]
        return [step for step in steps if step not in self.damaged]

    def one_rank(self) -> list[int]:
        """The id of a random training process; empty if none is left."""
        ranks = lab.ranks(self.out)
        return self.rng.sample(ranks, k=min(1, len(ranks)))

    def send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        self.send(signal.SIGKILL, lab.ranks(self.out))
        self.launcher.kill()  # last, because its end would signal the other processes
        self.launcher.wait()


# The faults. The docstring of each is its description in the table. `stop` returns the seconds until the run ended.


def kill_one(run: Run) -> None:
    """kill -9 of one process"""
    run.send(signal.SIGKILL, run.one_rank())


def kill_everything(run: Run) -> None:
    """kill -9 of all processes at once, as in a power cut"""
    run.kill_all()


def kill_in_save(run: Run) -> None:
    """kill -9 of all processes while a checkpoint is being written"""
    folder = run.out / "checkpoints"
    end = time.monotonic() + 30
    while run.running() and time.monotonic() < end and not any(folder.glob(".step_*")):
        time.sleep(0.002)
    time.sleep(run.rng.random() * 0.1)
    run.kill_all()


def kill_in_start(run: Run) -> None:
    """kill -9 of all processes during startup"""
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
        run.launcher.send_signal(number)  # has no effect if it has ended
        time.sleep(run.rng.random() / 2)
    run.launcher.wait(30)
    lab.wait_for(lambda: not lab.ranks(run.out), 30, "no process is left after a stop")  # they can outlive torchrun
    return time.monotonic() - began


def stop_one(run: Run) -> None:
    """SIGTERM to one process only"""
    run.send(signal.SIGTERM, run.one_rank())


def hang_one(run: Run) -> None:
    """one process hangs permanently (SIGSTOP)"""
    run.send(signal.SIGSTOP, run.one_rank())


def pause(run: Run) -> None:
    """all processes are suspended for 5 or 20 s (SIGSTOP, SIGCONT); the limit of the watchdog is 15 s"""
    pids = lab.ranks(run.out)
    run.send(signal.SIGSTOP, pids)
    time.sleep(run.rng.choice((5, 20)))
    run.send(signal.SIGCONT, pids)


def damage_checkpoint(run: Run) -> None:
    """a power cut, and in the newest checkpoint a bit is flipped or a file is truncated, emptied or deleted"""
    run.kill_all()
    checkpoints = run.checkpoints()
    if not checkpoints:
        return
    newest = checkpoints[0]
    step = int(newest.name[5:])
    # At least one other checkpoint must be intact. Otherwise the run would end with an error, since only a person can
    # decide whether to start from scratch.
    if not set(run.intact()) - {step}:
        return
    run.damaged.add(step)
    file = run.rng.choice(sorted(f for f in newest.iterdir() if f.stat().st_size))
    content = bytearray(file.read_bytes())
    how = run.rng.choice(("flip", "flip", "truncate", "empty", "delete"))
    if how == "flip":
        content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: run.rng.randrange(len(content))])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


def write_partly(run: Run) -> None:
    """a power cut leaves partly written checkpoints, temporary and final, and a partly written line of metrics"""
    run.kill_all()
    names = [".step_190.dead"]
    if run.intact():  # see `damage_checkpoint`
        names.append("step_195")
    for name in names:
        (run.out / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (run.out / "checkpoints" / name / "rank_00000.safetensors").write_bytes(run.rng.randbytes(1000))
    run.damaged.add(195)
    if (run.out / "metrics.jsonl").exists():
        with open(run.out / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step": 1')


def fill_disk(run: Run) -> None:
    """the disk is full for one checkpoint, or until the run gives up"""
    filler = run.out.parent / "filler"
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    failures = run.output().count("no checkpoint of step")
    enough = run.rng.choice((1, 2))
    lab.wait_for(
        lambda: not run.running() or run.output().count("no checkpoint of step") >= failures + enough,
        60,
        "the full disk is noticed",
    )
    if enough == 2:
        with contextlib.suppress(RuntimeError):
            lab.wait_for(lambda: not run.running(), 20, "the run has given up")
    filler.unlink()


def start_twice(run: Run) -> None:
    """the same command is started again while the run goes on: it is refused"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": PATH}
    second = subprocess.run(
        [sys.executable, *run.flags], cwd=lab.ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    refused = second.returncode == 2 and f"--output_dir {run.out} is in use by process" in second.stderr
    assert refused or not run.running(), f"status {second.returncode}: {second.stderr[-500:]}"


FAULTS = (  # those listed twice are drawn twice as often
    kill_one, kill_everything, kill_in_save, kill_in_start, kill_launcher, stop, stop, stop_one, hang_one, pause,
    damage_checkpoint, damage_checkpoint, write_partly, fill_disk, start_twice,
)  # fmt: skip
NEED_TWO_PROCESSES = (kill_launcher, hang_one)  # another process has to notice the fault
