"""Reading, writing and hashing whole files: JSON, atomic replacement, flushing to disk, digests."""

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

LARGEST = 2**30  # bytes of a file that is held in memory: the numbers of tens of millions of dropped records fit


def write_atomically(file: Path, text: str) -> None:
    """Write `text` to `file` so that a reader, at any time, sees either the old content or the new one."""
    write_together({file: [text]})


def write_together(files: dict[Path, Iterable[str]]) -> None:
    """Write text files of one folder, given in pieces, so that all are on the disk before the first gets its name.

    They get their names in the order given, and the last one of before is removed first: where the last has its name,
    all are of one writing. A failure leaves the folder as it was; one that comes between two names leaves the rest
    under their temporary ones, as a killed process does.
    """
    temporary, is_begun = {file: temporary_name(file) for file in files}, False
    try:
        for file, pieces in files.items():
            with names_file(file), open(temporary[file], "w", encoding="utf-8") as out:
                out.writelines(pieces)
                # A power cut could otherwise leave an empty file under the final name.
                out.flush()
                os.fsync(out.fileno())
        *_, last = files
        if len(files) > 1 and last.exists():
            is_begun = True
            last.unlink()
            sync(last.parent)
        for file in files:
            os.replace(temporary[file], file)
            is_begun = True
            sync(file.parent)
    finally:
        for file in () if is_begun else temporary.values():
            file.unlink(missing_ok=True)  # partly written if the disk was full


def temporary_name(file: Path) -> Path:
    """The name of a file while it is written."""
    return file.with_name(f".{file.name}.writing")


@contextlib.contextmanager
def names_file(file: Path) -> Iterator[None]:
    """Have an OSError of the block name the file. Python's own do not where writing fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:  # a library's own text
            raise OSError(f"{file}: {error}") from error
        raise OSError(error.errno, error.strerror, str(file)) from error


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with names_file(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of folders on file systems that cannot flush them
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush a folder and the files in it to disk."""
    for file in folder.iterdir():
        if file.is_file():
            sync(file)
    sync(folder)


def read_json(file: Path) -> dict:
    """The JSON object in `file`, or {} if the file does not exist.

    Raises:
        ValueError: the file does not contain JSON, or its JSON value is not an object.
    """
    if not os.path.lexists(file):
        return {}
    content = read_whole(file)
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists without end
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    if "\\ud" in text.lower():  # half of a surrogate pair, which could not be written anywhere?
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"{file} has half of a surrogate pair, {half}, which is no character") from None
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON, for `object_pairs_hook`: of a key that is there twice, json would drop the first value.

    Raises:
        ValueError: a key is there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"an object has a key twice: {reprlib.repr([name for name, _ in pairs])}")
    return made


def read_whole(file: Path) -> bytes:
    """The content of a file that is held in memory: a configuration, a template, a vocabulary.

    Raises:
        ValueError: it is none, such as a folder, a FIFO or a device, or it has more than `LARGEST` bytes.
    """
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            if (size := os.fstat(opened.fileno()).st_size) > LARGEST:
                raise ValueError(f"{file} has {size:,} bytes, and at most {LARGEST:,} are read; give another file")
            return opened.read()
    except IsADirectoryError as error:
        raise ValueError(f"{file} is a folder; give a file") from error


def check_regular(file: str | Path) -> None:
    """Raise ValueError for what exists and is neither a file nor a folder: a FIFO or a device may have no end."""
    path = Path(file)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        problem = "is a link to nothing" if path.is_symlink() else None
    except (OSError, ValueError) as error:  # links in a circle; a name that no file can have
        problem = str(error)
    else:
        problem = None if stat.S_ISREG(kind) or stat.S_ISDIR(kind) else "is neither a file nor a folder"
    if problem:
        raise ValueError(f"{file}: {problem}; give a file")


def write_json(file: Path, value: dict) -> None:
    """Write a JSON object to `file` atomically (`write_atomically`)."""
    write_atomically(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    update_digest(digest, file)
    return digest.hexdigest()


def update_digest(digest, file: Path) -> int:
    """Update a `hashlib` digest with the content of `file`; returns the file's size in bytes."""
    check_regular(file)  # of a device there is no end
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
        return content.tell()
