"""Reading, writing and hashing whole files: JSON, atomic replacement, digests."""

import json
import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write `text` to `file` so that a reader, at any time, sees either the old content or the new one."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        # The content has to be on the disk before the rename: a power cut could otherwise leave an empty file.
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # partly written if the disk was full


def read_json(file: Path) -> dict:
    """The JSON object in `file`, or {} if the file does not exist.

    Raises:
        ValueError: the file does not contain JSON, or its JSON value is not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:  # the latter for lists in lists without end
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(file: Path, value: dict) -> None:
    """Write a JSON object to `file` atomically (`write_atomically`)."""
    write_atomically(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def update_digest(digest, file: Path) -> int:
    """Update a `hashlib` digest with the content of `file`; returns the file's size in bytes."""
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
        return content.tell()
