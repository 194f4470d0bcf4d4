"""A cache of tokenized data on disk: built once on each machine, then memory-mapped by all its processes.

All ranks of a machine share one copy, in the kernel's page cache, and a second start with the same data only reads the
small per-example arrays. A cache entry is named by a hash of everything it was made from, so a changed file or
tokenizer makes a new entry. It is written under a temporary name and published by one rename, so a killed run leaves
no incomplete entry. One that a disk has damaged since is found by its checksums, which one process of each machine
compares at every start, and is made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rm import json_keys
from rm.data.examples import Examples
from rm.distributed import process_group as dist
from rm.files import check_regular, read_json, sync, sync_files, update_digest, write_json
from rm.json_keys import Key
from rm.terminal import warn

FILES = {"made.json", *(f"{field.name}.npy" for field in fields(Examples))}  # of an entry
CHECKSUMS = "checksums.json"  # file name -> CRC-32 of all other files of an entry
A_DAY = 24 * 3600
FORMAT = 11  # version of the entries' layout, part of their names: after a change old entries are not read


def default_folder() -> str:
    """The user's cache directory for this package (XDG Base Directory Specification)."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rm")


def open_or_make(
    folder: str,
    name: list[str],
    files: tuple[str, ...],
    make: Callable[[], tuple[Examples, dict]],
    keys: dict[str, Key] | None = None,
) -> tuple[Examples, dict]:
    """Open the cache entry for these files, after making it if there is none. All ranks call it.

    Args:
        folder: of the cache.
        name: everything besides `files` that the result depends on: tokenizer, settings.
        files: the files whose contents the result depends on. For one that cannot be read, `make` raises the error.
        make: returns the examples and a JSON object to store with them (such as a report of what was dropped); called
            on one process of each machine if there is no entry, or a damaged one.
        keys: that the JSON object may hold; None: any.

    Returns:
        The examples, memory-mapped, and the JSON object that was stored with them.
    """
    entry = Path(folder) / _digest([str(FORMAT), *name], files)
    made_keys = {"hash": Key(str, required=True), "made": Key(dict, keys=keys, required=True)}  # of made.json

    def make_unless_whole() -> None:
        damage = _damage(entry, made_keys) if entry.exists() else None
        if damage:
            warn(f"{damage}: this entry of the cache is made again")
        if damage or not entry.exists():
            _write(entry, *make(), made_keys)

    dist.once_per_node(make_unless_whole)  # each machine may have a cache of its own
    examples, stored = Examples.open(entry), json_keys.read(entry / "made.json", made_keys)
    # Computing the hash would read every token on every rank at every start.
    examples.hash = stored["hash"]
    return examples, stored["made"]


def _write(entry: Path, examples: Examples, made: dict, keys: dict[str, Key]) -> None:
    """Write an entry; it replaces a damaged one."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for leftover in entry.parent.glob("writing-*"):  # of processes that were killed; writing takes minutes
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > A_DAY:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix="writing-", dir=entry.parent))
    new = temporary / "new"
    try:
        examples.save(new)
        write_json(new / "made.json", {"hash": examples.hash, "made": made})
        write_json(new / CHECKSUMS, {file.name: _crc32(file) for file in new.iterdir()})
        sync_files(new)
        if entry.exists() and _damage(entry, keys):  # another machine that shares the folder may have been faster
            os.rename(entry, temporary / "damaged")
        try:
            os.rename(new, entry)
            sync(entry.parent)
        except OSError:
            if not entry.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _damage(entry: Path, keys: dict[str, Key]) -> str | None:
    """What has changed in an entry since it was written; None if nothing has. `keys`: of its made.json."""
    file = entry / CHECKSUMS
    try:
        checksums = read_json(file)
        if missing := FILES - checksums.keys():
            return f"{file} lacks {min(missing)}"
        for name, checksum in checksums.items():
            file = entry / name
            if _crc32(file) != checksum:
                return f"{file} has changed since it was written"
        json_keys.read(entry / "made.json", keys)
    except (OSError, ValueError) as error:
        return f"{file} is damaged ({error})"
    return None


def _crc32(file: Path) -> int:
    check_regular(file)  # of a device there is no end
    checksum = 0
    with open(file, "rb") as content:
        while block := content.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _digest(name: list[str], files: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps(name).encode())
    for file in files:
        try:
            size = update_digest(digest, Path(file))
            # The size tells two files apart from one file with the contents of both.
            digest.update(f" {size} ".encode())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()
