"""How a command ends: one line for a user's mistake, and exit statuses that shells and torchrun understand."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator

from rm.distributed.process_group import Stopped, is_lost_connection, rank, under_torchrun, world_size
from rm.terminal import printable, warn


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake (ValueError, OSError) ends the program with one line on stderr and status 2, no traceback.

    All ranks usually meet the same mistake. Rank 0 reports it; the others wait a moment, so that the launcher ends them
    first, and report only a mistake of their own (such as a disk that is missing on one machine).

    A run that was stopped by a signal ends with status 128 + the signal's number, as shells expect, but with 0 under
    torchrun, which restarts whatever ends with another status. So does Ctrl-C before there is anything to save.
    """
    try:
        with _errors_to_exit_status():
            yield
    except SystemExit as done:
        _exit_at_once(done.code)
        raise
    except Exception as error:
        if is_lost_connection(error):
            warn(
                f"error [rank {rank()}]: another process has ended or cannot be reached: see what it said last. The "
                f"same command goes on from the newest checkpoint ({str(error).partition('. ')[0]})"
            )
            _exit_at_once(1)
        if _has_peers():
            traceback.print_exc()
            _exit_at_once(1)
        raise
    _exit_at_once(0)


def end_with_the_pipe() -> None:
    """Let `| head` end this process without a word, as it ends other programs that print a report.

    Training does not call this: it is to say why it ended.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _has_peers() -> bool:
    """Whether Python's own shutdown is to be avoided at the end of this process.

    Threads of NCCL may wait in it for ranks that are dead or in a collective. And on a busy machine threads of torch
    that are still at work abort the process (torch 2.13), which torchrun takes for a failure: it then kills the ranks
    that are still writing.
    """
    return under_torchrun() or world_size() > 1


def _exit_at_once(status: int | None) -> None:
    """End a process that has peers without Python's own shutdown: everything is written by now."""
    if _has_peers():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reading end of a pipe may be closed
                stream.flush()
        os._exit(status or 0)


@contextlib.contextmanager
def _errors_to_exit_status() -> Iterator[None]:
    """Report what ended the program, and turn it into an exit status."""
    try:
        yield
    except SystemExit as done:
        if done.code == 2:  # from argparse, which has printed the mistake
            _say_again(done.__context__)
            _prevent_restart()
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Stopped as stopped:
        sys.exit(0 if under_torchrun() else 128 + stopped.signal)
    except (ValueError, OSError) as error:
        _report_and_exit(error)


def _report_and_exit(error: Exception) -> None:
    where = ""
    if rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)  # for rank 0 to report the same mistake first
        where = f" [rank {rank()}]"
    warn(f"error{where}: {error}")
    if isinstance(error, ValueError):
        _say_again(error)
        _prevent_restart()
    sys.exit(2)


def _say_again(error: BaseException | None) -> None:
    """Have a mistake said again when torchrun has ended: it prints some thirty lines about the end of its processes."""
    if error is not None and under_torchrun() and rank() == 0:
        # A zombie has ended: whoever started torchrun may read its output first.
        wait = 'for _ in $(seq 500); do case $(ps -o stat= -p "$1") in "" | Z*) break ;; esac; sleep 0.2; done'
        say = "printf '%s\\n' \"$2\" >&2"  # echo may take \n for a line break
        command = ["sh", "-c", f"{wait}; {say}", "sh", str(os.getppid()), printable(f"error: {error}")]
        subprocess.Popen(command, start_new_session=True)  # torchrun's signals are not for it


def _prevent_restart() -> None:
    """End torchrun, too: with --max-restarts it would start all processes again, into the same mistake."""
    if under_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        os.kill(os.getppid(), signal.SIGTERM)
