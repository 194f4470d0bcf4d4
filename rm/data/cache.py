"""Tokenized data on disk: made once on each machine, then mapped into memory by all its processes.

Eight ranks hold one copy between them, in the kernel's page cache, and a second start of the same data reads nothing
but an index. An entry is named by what it was made from, so a changed file or tokenizer makes a new one; it is
written under another name and published by one rename, so a killed run leaves no half entry.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rm.data.examples import Examples
from rm.distributed import process_group as dist
from rm.files import feed

FORMAT = 4  # of an entry; a new number leaves old entries alone


def default_folder() -> str:
    """Where caches of a user belong (XDG base directory specification)."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rm")


def open_or_make(
    folder: str, name: list[str], files: tuple[str, ...], make: Callable[[], tuple[Examples, dict]]
) -> tuple[Examples, dict]:
    """Examples, and what is to be remembered of their making, from the cache, or made and put there.

    Args:
        name: whatever else the result depends on: tokenizer, settings.
        files: whose contents it depends on. Those that cannot be read are left for `make` to complain of.
        make: called on one process of each machine if there is no entry yet.
    """
    entry = Path(folder) / _digest([str(FORMAT), *name], files)
    if dist.any_rank(not entry.exists()):  # on any rank: caches of several machines may differ
        dist.once_per_node(lambda: entry.exists() or _write(entry, *make()))
    examples, stored = Examples.open(entry), json.loads((entry / "made.json").read_text())
    examples.hash = stored["hash"]  # or every rank would read every token at every start to compute it
    return examples, stored["made"]


def _write(entry: Path, examples: Examples, made: dict) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix="writing-", dir=entry.parent))
    try:
        examples.save(writing)
        (writing / "made.json").write_text(json.dumps({"hash": examples.hash, "made": made}))
        if not entry.exists():  # another machine that shares the folder may have been faster
            os.rename(writing, entry)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _digest(name: list[str], files: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps(name).encode())
    for file in files:
        try:
            digest.update(f" {feed(digest, Path(file))} ".encode())  # the length, so that two files are not one
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()
