"""Contenders that take turns, each in a process of its own.

A contender loads, reports that it is ready, and waits. It computes one block of work per turn (a step, or a pass over
the data), so that A, B, A, B interleave strictly, and the memory of one is not part of the other's. Measured per turn:

- wall and process CPU seconds, taken in the contender around its block, and how many cores other processes used
  meanwhile: with two threads on two cores a single busy process makes a step several times slower, and not by the
  same factor for both sides, so where this number is far above 0 the times are worth little;
- `peak`: anonymous memory (RssAnon of /proc/PID/status), sampled every 10 ms by the measuring process. The page has the
  highest sample of all turns minus the sample after loading, when the weights are in memory, the optimizer has no state
  yet, garbage has been collected and free heap memory returned. So it covers gradients, optimizer state, activations
  and temporaries, but not the weights;
- in one more turn, which is not timed (the batch with the longest text once more), `allocated`: the memory events of
  torch's allocator, recorded by its profiler: the highest running sum since the start of that step. So it covers
  gradients, activations and temporaries, but neither weights nor optimizer state.
"""

import ctypes
import gc
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

spawn = multiprocessing.get_context("spawn")  # nothing is inherited: a contender's memory is its own


class Enough(Exception):
    """There is no further turn: leaves a training loop."""


class Turns:
    """A contender's side: `begin` waits for its turn and starts the clocks, `end` stops them."""

    def __init__(self, pipe):
        self.pipe, self.loaded = pipe, False

    def begin(self):
        """Wait for a turn; returns the argument that `Contender.turn` was given."""
        if not self.loaded:  # before the first turn only: later ones use the heap as it is
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.loaded = True
        self.pipe.send("ready")
        go_on, profile, argument = self.pipe.recv()
        if not go_on:
            raise Enough
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiling = profile
        if profile:
            self.profiler.start()
        self.wall, self.cpu, self.busy = time.perf_counter(), time.process_time(), _busy()
        return argument

    def end(self, **facts) -> None:
        """Stop the clocks and send the measurements; `facts` are further values of this turn (loss, tokens)."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        facts |= {"wall": wall, "cpu": cpu, "others": max(0.0, _busy() - self.busy - cpu) / wall}
        if self.profiling:
            self.profiler.stop()
            facts["allocated"] = allocator_peak(self.profiler)
        self.pipe.send(facts)


def _busy() -> float:
    """Seconds that all cores have been busy since the machine started, stolen time included."""
    user, nice, system, _, _, interrupt, soft, stolen, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")


def allocator_peak(profiler: torch.profiler.profile) -> int:
    """The highest running sum of the allocator's events, in bytes."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


class Contender:
    """The measuring side of a contender."""

    def __init__(self, name: str, threads: int, work, *args):
        """Start `work(turns, *args)` in a process of its own and wait until it is loaded."""
        self.name, self.turns, self.allocated = name, [], None
        self.pipe, theirs = spawn.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self.process = spawn.Process(target=_serve, args=(theirs, threads, work, args), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()
        self.loaded = self._anonymous()

    def turn(self, argument=None, profile: bool = False) -> dict:
        self.pipe.send((True, profile, argument))
        facts = self._receive()
        facts["peak"] = self.sampled - self.loaded
        self._receive()
        if profile:
            self.allocated = facts["allocated"]
        else:
            self.turns.append(facts)
        return facts

    def close(self) -> None:
        self.pipe.send((False, False, None))
        self.process.join()

    def of(self, name: str, warmup: int) -> list[float]:
        return [facts[name] for facts in self.turns[warmup:]]

    @property
    def peak(self) -> int:
        return max(self.of("peak", 0))

    def _receive(self):
        self.sampled = 0
        try:
            while not self.pipe.poll(0.01):
                self.sampled = max(self.sampled, self._anonymous())
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} failed: see its traceback above") from None

    def _anonymous(self) -> int:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def _serve(pipe, threads: int, work, args: tuple) -> None:
    sys.stdout = sys.stderr  # stdout is for the page
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(threads)
    try:
        work(Turns(pipe), *args)
    except Enough:
        pass


def in_child(work, *args) -> None:
    """Run a function in a process of its own, to its end."""
    process = spawn.Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed: see its traceback above")


def interleave(contenders: list[Contender], rounds: int, tolerance: float = float("inf")) -> None:
    """Give turns to A, B, A, B, ..., and then one profiled turn to each.

    Exits after the first round if the losses differ by more than `tolerance`.
    """
    for number in range(rounds):
        facts = [c.turn() for c in contenders]
        losses = [f["loss"] for f in facts if "loss" in f]
        print(f"round {number + 1}/{rounds}:", *(f"{c.name} {c.turns[-1]['wall']:.2f} s" for c in contenders),
              "losses", losses, file=sys.stderr)  # fmt: skip
        if number == 0 and losses and max(losses) - min(losses) > tolerance:
            raise SystemExit(f"not the same work: the first losses are {losses}, more than {tolerance} apart")
    for contender in contenders:
        contender.turn(profile=True)
        contender.close()
