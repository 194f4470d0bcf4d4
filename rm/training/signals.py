"""Who tells a run to stop, and who notices that it stands still: signals and a watchdog, in one thread of their own.

A Python signal handler runs in the main thread, and not while that thread waits in a collective. So the handlers here
do nothing: what counts is the byte that the interpreter writes to a pipe (`signal.set_wakeup_fd`) the moment the
signal arrives, whatever the main thread does, and the thread that reads it.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time

from rm.distributed import process_group as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STALLED = 86  # the exit status of a process that its watchdog ended
FIRST_STEP = 3  # times the patience, since the first step compiles and loads
SUSPENDED = 5  # seconds between two looks of a thread that looks four times a second: the whole process stood still
STACKS_AFTER = 20  # seconds without progress after a signal; torchrun kills at 30 by default


class Watchdog:
    """`asked` is the name of the signal that told this process to stop, or None; the main thread calls `beat`.

        with Watchdog(stall_timeout=600) as watch:
            while not watch.asked:
                ...
                watch.beat()

    Signals may come any number of times. Only a person at a terminal who presses Ctrl-C a second time, a second or more
    after the first, ends the process at once.
    """

    def __init__(self, stall_timeout: float):
        """`stall_timeout`: after so many seconds without a beat the process shows its stacks and ends; 0: never."""
        self.stall_timeout = stall_timeout
        self.asked: str | None = None
        self.number = signal.SIGTERM
        self.asked_at = 0.0
        self.beat(FIRST_STEP)

    def beat(self, patience: float = 1) -> None:
        """There is progress; the next beat may take `patience` times the usual limit."""
        self.beaten, self.patience, self.stacks_shown = time.monotonic(), patience, False

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.wakeup_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        ignored = [s for s in (signal.SIGHUP,) if signal.getsignal(s) == signal.SIG_IGN]  # nohup
        self.before = {s: signal.signal(s, lambda *_: None) for s in SIGNALS if s not in ignored}
        self.beat(FIRST_STEP)
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        os.close(self.writer)  # ends the thread
        self.thread.join()
        os.close(self.reader)

    def _look(self) -> None:
        looked = time.monotonic()
        while True:
            ready, *_ = select.select([self.reader], [], [], 0.25)
            looked, before = time.monotonic(), looked
            if looked - before > SUSPENDED:  # by SIGSTOP or a scheduler; that was nobody's fault
                self.beat(self.patience)
            received = os.read(self.reader, 64) if ready else b""
            if ready and not received:
                return
            for number in received:
                self._heard(number)
            self._check()

    def _heard(self, number: int) -> None:
        now = time.monotonic()
        if number not in SIGNALS:
            return
        if self.asked is None:
            self.asked, self.number, self.asked_at = signal.Signals(number).name, number, now
            if dist.is_main():
                _tell(f"{self.asked}: saving after this step, then leaving")
        elif number == signal.SIGINT and now - self.asked_at > 1 and sys.stderr.isatty():
            _tell("left at once; nothing was saved since the last checkpoint")
            os._exit(128 + signal.SIGINT)

    def _check(self) -> None:
        now = time.monotonic()
        still = now - self.beaten
        if self.asked and now - max(self.beaten, self.asked_at) > STACKS_AFTER and not self.stacks_shown:
            self.stacks_shown = True
            self._show_stacks(f"no progress for {STACKS_AFTER} s after {self.asked}")
        if self.stall_timeout and still > self.stall_timeout * self.patience:
            self._show_stacks(f"no progress for {still:.0f} s (--stall_timeout {self.stall_timeout:g}): giving up")
            os._exit(STALLED)

    def _show_stacks(self, why: str) -> None:
        _tell(f"[rank {dist.rank()}] {why}. The stacks of all threads:")
        with contextlib.suppress(OSError, ValueError):  # a stderr that is no file
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(f"\n{text}", file=sys.stderr, flush=True)
