"""Signal handler and hang watchdog, in one thread of their own.

A Python signal handler runs in the main thread, and not while that thread waits in a collective. So the handlers here
do nothing: the interpreter writes a byte to a pipe (`signal.set_wakeup_fd`) the moment a signal arrives, whatever the
main thread does, and a thread reads the pipe.
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
STALLED = 86  # exit status of a process that its watchdog ended
FIRST_STEP = 3  # times the timeout, since the first step compiles and loads
POLL_SECONDS = 0.25
SUSPENDED = 5  # seconds between two polls: the whole process was suspended
STACKS_AFTER = 20  # seconds without progress after a signal; torchrun kills after 30 by default


class Watchdog:
    """`stop_signal` is the name of the signal that this process received, or None; the main thread calls `heartbeat`.

        with Watchdog(stall_timeout=600) as watchdog:
            while not watchdog.stop_signal:
                ...
                watchdog.heartbeat()

    Signals may arrive any number of times. Only a user at a terminal who presses Ctrl-C a second time, a second or more
    after the first, ends the process at once.
    """

    def __init__(self, stall_timeout: float):
        """`stall_timeout`: seconds without a heartbeat after which the process prints its stacks and ends; 0: never."""
        self.stall_timeout = stall_timeout
        self.stop_signal: str | None = None
        self.signal_number = signal.SIGTERM
        self.signalled_at = 0.0
        self.heartbeat(FIRST_STEP)

    def heartbeat(self, timeout_scale: float = 1) -> None:
        """There is progress; the next heartbeat may take `timeout_scale` times the usual timeout."""
        self.last_heartbeat, self.timeout_scale, self.stacks_printed = time.monotonic(), timeout_scale, False

    def __enter__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.previous_wakeup_fd = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        ignored = [s for s in (signal.SIGHUP,) if signal.getsignal(s) == signal.SIG_IGN]  # under nohup
        self.previous_handlers = {s: signal.signal(s, lambda *_: None) for s in SIGNALS if s not in ignored}
        self.heartbeat(FIRST_STEP)
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_wakeup_fd)
        os.close(self.writer)  # ends the thread
        self.thread.join()
        os.close(self.reader)

    def _run(self) -> None:
        polled = time.monotonic()
        while True:
            ready, *_ = select.select([self.reader], [], [], POLL_SECONDS)
            previous, polled = polled, time.monotonic()
            if polled - previous > SUSPENDED:  # by SIGSTOP or a scheduler: not the training's fault
                self.heartbeat(self.timeout_scale)
            received = os.read(self.reader, 64) if ready else b""
            if ready and not received:  # the pipe was closed
                return
            for number in received:
                self._on_signal(number)
            self._check_progress()

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if number not in SIGNALS:
            return
        if self.stop_signal is None:
            self.stop_signal, self.signal_number, self.signalled_at = signal.Signals(number).name, number, now
            if dist.is_main():
                _print(f"{self.stop_signal}: saving after this step, then leaving")
        elif number == signal.SIGINT and now - self.signalled_at > 1 and sys.stderr.isatty():
            _print("left at once; nothing was saved since the last checkpoint")
            os._exit(128 + signal.SIGINT)

    def _check_progress(self) -> None:
        now = time.monotonic()
        idle = now - self.last_heartbeat
        if self.stop_signal and not self.stacks_printed:
            if now - max(self.last_heartbeat, self.signalled_at) > STACKS_AFTER:
                self.stacks_printed = True
                self._print_stacks(f"no progress for {STACKS_AFTER} s after {self.stop_signal}")
        if self.stall_timeout and idle > self.stall_timeout * self.timeout_scale:
            self._print_stacks(f"no progress for {idle:.0f} s (--stall_timeout {self.stall_timeout:g}): giving up")
            os._exit(STALLED)

    def _print_stacks(self, why: str) -> None:
        _print(f"[rank {dist.rank()}] {why}. The stacks of all threads:")
        with contextlib.suppress(OSError, ValueError):  # stderr may not be a file
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the reading end of a pipe may be closed
        print(f"\n{text}", file=sys.stderr, flush=True)
