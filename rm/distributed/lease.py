"""A lease on an output folder: one run at a time writes to it, also where several machines share the disk.

The lease is a file in the folder that says who holds it. A thread renews it by its modification time for as long as the
process lives, so that the lease of a machine that lost its power runs out. Whether a process of this machine lives is
known at once. Ages are differences of two times that the file server gave: clocks of machines need not agree.
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rm.distributed import process_group as dist
from rm.files import check_regular, names_file, sync
from rm.json_keys import Key, check_keys
from rm.terminal import warn

FILE = "lease.json"
LONGEST = 2**16  # characters, several times as many as a lease has
RENEWED_EVERY = 10  # seconds
RUNS_OUT_AFTER = 120  # seconds without a renewal; NFS clients may see one up to a minute late


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: the content of lease.json."""

    id: str  # random, of this lease
    host: str
    machine: str  # since its last boot; a container with process numbers of its own counts as another one
    pid: int
    process_start: str  # tells the process from a later one of the same number
    slurm_job: str | None
    slurm_restart: int  # how often SLURM has requeued the job
    torchrun: str | None  # the id of the rendezvous, which a restart by torchrun keeps
    since: str


KEYS = {
    "id": Key(str, required=True),
    "host": Key(str, required=True),
    "machine": Key(str, required=True),
    "pid": Key(int, minimum=1, maximum=2**31 - 1, required=True),
    "process_start": Key(str, required=True),
    "slurm_job": Key(str),
    "slurm_restart": Key(int, minimum=0, required=True),
    "torchrun": Key(str),
    "since": Key(str, required=True),
}


@contextlib.contextmanager
def held(output_dir: str | None) -> Iterator[None]:
    """Hold the lease of a folder, which is made if it does not exist; None: of no folder. All ranks call it.

    Raises:
        ValueError: another run holds it, or the folder cannot be written.
    """
    lease = None if output_dir is None else dist.on_main(lambda: Lease(Path(output_dir)))
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


class Lease:
    """The lease of a folder, which this process holds until `release`."""

    def __init__(self, folder: Path):
        """Take it. Raises ValueError where another run holds it, or the folder cannot be written."""
        check_writable(folder)
        self.file, self.holder = folder / FILE, _this_process()
        self.made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{_prefix(self.holder.machine)}{self.holder.pid}.{self.holder.id}"
        try:
            with names_file(new):
                new.write_text(json.dumps(asdict(self.holder)), encoding="utf-8")
                sync(new)
            self._take(new)
            self._remove_leftovers(new)
        except BaseException:
            self._remove_made()
            raise
        finally:
            new.unlink(missing_ok=True)
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.thread.start()

    def release(self) -> None:
        """Give the folder free; remove it if this lease made it and nothing was written to it."""
        self.released.set()
        self.thread.join(timeout=RENEWED_EVERY)  # it may wait for a disk that is gone
        with contextlib.suppress(OSError, ValueError):
            if _read(self.file, self.file)[0] == self.holder:
                self.file.unlink()
        self._remove_made()

    def _take(self, new: Path) -> None:
        """Give `new`, which has the content of this lease, the lease's name as well."""
        while True:
            with contextlib.suppress(FileExistsError):
                return _link(new, self.file)
            with contextlib.suppress(FileNotFoundError):  # released at this moment
                holder, age = _read(self.file, new)
                if holder == self.holder:  # NFS may report a failure although the link was made
                    return None
                if not _may_take_over(holder, age, self.holder):
                    raise ValueError(_in_use(self.file, holder, age))
                self._remove(holder, new)

    def _remove_leftovers(self, new: Path) -> None:
        """Remove what processes left that were killed while they took a lease."""
        for leftover in self.file.parent.glob(f".{FILE}.*"):
            with contextlib.suppress(OSError):
                if leftover != new and self._is_left(leftover, new):
                    leftover.unlink()

    def _is_left(self, leftover: Path, new: Path) -> bool:
        holder, age = _read(leftover, new)
        if holder is None and leftover.name.startswith(_prefix(self.holder.machine)):  # killed while it was written
            pid = leftover.name.split(".")[-2]
            return pid.isdecimal() and _process_start(int(pid)) in ("", "ended")
        return _may_take_over(holder, age, self.holder)

    def _remove(self, ended: Holder | None, new: Path) -> None:
        """Remove a lease that nobody holds any more; one process at a time, so that none removes that of a faster one.

        Raises:
            FileNotFoundError: it has been removed.
        """
        removing = self.file.with_name(f".{FILE}.removing")
        try:
            _link(new, removing)
        except FileExistsError:
            time.sleep(0.02)
            other, age = _read(removing, new)
            if _may_take_over(other, age, self.holder):  # it was killed between two lines of this function
                removing.unlink()
            return
        try:
            if _read(self.file, new)[0] == ended:
                self.file.unlink()
        finally:
            removing.unlink()

    def _renew(self) -> None:
        while not self.released.wait(RENEWED_EVERY):
            try:
                holder, _ = _read(self.file, self.file)
                if holder == self.holder:
                    os.utime(self.file)  # to the time of the file server
            except (OSError, ValueError):  # deleted, or a disk that is away for a while: not for a lease to report
                continue
            if holder not in (None, self.holder) and not self.released.is_set():
                # Not even a checkpoint may be written: it would be among those of the other run.
                warn(
                    f"error: {self.file.parent} was taken over by {_name(holder)}: the SLURM job was started again, or "
                    f"this process was suspended for more than {RUNS_OUT_AFTER} s. It ends here, so that the two do "
                    f"not overwrite each other"
                )
                os._exit(2)

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()


def _prefix(machine: str) -> str:
    """How the name of a lease begins that a process of this machine writes."""
    return f".{FILE}.{hashlib.sha256(machine.encode()).hexdigest()[:8]}."


def check_writable(folder: Path) -> None:
    """Raise ValueError where --output_dir cannot be written."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"--output_dir {folder} cannot be written: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written: {existing} is read-only")


def _may_take_over(old: Holder | None, age: float, new: Holder) -> bool:
    """Whether the process that holds a lease has ended, or is to be replaced by this one.

    Args:
        old: None for a file that cannot be read.
        age: seconds since the last renewal.
    """
    has_run_out = abs(age) > RUNS_OUT_AFTER  # one of the future: the file server's clock was set back since
    if old is None:
        return has_run_out
    if new.slurm_job is not None and old.slurm_job == new.slurm_job and old.slurm_restart < new.slurm_restart:
        return True
    if old.machine == new.machine:
        return not _is_alive(old)
    # The same rendezvous: torchrun has moved rank 0 to another machine.
    return has_run_out or (new.torchrun is not None and old.torchrun == new.torchrun)


def _in_use(file: Path, holder: Holder | None, age: float) -> str:
    who = f"a run whose {FILE} cannot be read" if holder is None else _name(holder)
    return (
        f"--output_dir {file.parent} is in use by {who}, last seen {max(0, age):.0f} s ago. Wait until it ends, or "
        f"name another folder. Of a run that died on another machine, the folder is free {RUNS_OUT_AFTER} s after it "
        f"was last seen"
    )


def _name(holder: Holder) -> str:
    job = f", SLURM job {holder.slurm_job}" if holder.slurm_job else ""
    return ascii(f"process {holder.pid} on {holder.host}{job} since {holder.since}")[1:-1]


def _read(file: Path, new: Path) -> tuple[Holder | None, float]:
    """(the content of a lease, None if it is not as it was written; seconds from its last renewal to `new`)

    Raises:
        ValueError: it is a FIFO, a device or a link to nothing, which no run has written.
    """
    check_regular(file)
    with open(file, encoding="utf-8", errors="replace") as opened:  # NFS looks at the server when a file is opened
        age = new.stat().st_mtime - os.fstat(opened.fileno()).st_mtime
        try:
            content = json.loads(opened.read(LONGEST))
            check_keys(file, content, KEYS)
            return Holder(**{name: content.get(name) for name in KEYS}), age
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None, age


def _link(file: Path, name: Path) -> None:
    """Give a file a second name. It has its content at once, or FileExistsError is raised."""
    try:
        os.link(file, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: there the lease may be seen without its content, as in use
        content = file.read_bytes()
        with open(name, "xb") as out:
            out.write(content)


def _this_process() -> Holder:
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        id=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        slurm_restart=int(restart) if restart.isdecimal() else 0,
        torchrun=None if torchrun == "none" else torchrun,  # torchrun's default
        since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _machine() -> str:
    """What tells apart machines, their boots, and containers in which a process has another number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_alive(holder: Holder) -> bool:
    """Whether the process of a holder on this machine lives."""
    try:
        os.kill(holder.pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return _process_start(holder.pid) in ("", holder.process_start)


def _process_start(pid: int) -> str:
    """When a process of this machine was started, as the system counts it; "" where it does not tell."""
    if sys.platform != "linux":
        return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    try:
        # Field 3 is the state, 22 the time. Field 2 is a name in parentheses, which may have spaces.
        state, *others = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state in "ZX" else others[18]  # Z: its parent has not taken notice yet
