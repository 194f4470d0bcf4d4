"""CLI"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from rm.distributed.process_group import Stopped, rank, under_torchrun


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake (ValueError, OSError) ends the program with one line on stderr and status 2, no traceback.

    All ranks meet the same mistake. Rank 0 tells it; the others wait a moment, so that the launcher ends them first,
    and speak only if the mistake was theirs alone (a disk that one machine lacks).

    A run that was told to stop ends with 128 + the signal's number, as a shell has it, but with 0 under torchrun, which
    would start again whoever left with anything else. Ctrl-C before there is anything to save ends it likewise.
    """
    try:
        with _told():
            yield
    except SystemExit as done:
        _leave(done.code)
        raise
    _leave(0)


def _leave(status: int | None) -> None:
    """End under torchrun at once, without taking Python down: everything is written.

    On a busy machine some of torch's threads, at work meanwhile, abort the process (torch 2.13). torchrun takes that
    for a failure, and kills the ranks that still write.
    """
    if under_torchrun():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # whoever read it may be gone
                stream.flush()
        os._exit(status or 0)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say what ended the program, and turn it into an exit status."""
    try:
        yield
    except SystemExit as done:
        if done.code == 2:  # of argparse, which has told the mistake
            _no_other_attempt()
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Stopped as stopped:
        sys.exit(0 if under_torchrun() else 128 + stopped.signal)
    except (ValueError, OSError) as error:
        where = ""
        if rank() != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
            where = f" [rank {rank()}]"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ValueError):
            _no_other_attempt()
        sys.exit(2)


def _no_other_attempt() -> None:
    """Have torchrun end: a mistake does not get better by starting everything again, which --max-restarts asks for."""
    if under_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        os.kill(os.getppid(), signal.SIGTERM)
