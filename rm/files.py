"""Files as a whole: JSON read and written, replaced so that no reader meets half of one, hashed."""

import json
import os
from pathlib import Path


def replace(file: Path, text: str) -> None:
    """Write a file so that whoever reads it, at any time, finds the old text or the new one."""
    writing = file.with_name(f".{file.name}.writing")
    try:
        writing.write_text(text, encoding="utf-8")
        with open(writing, "rb") as written:
            os.fsync(written.fileno())
        os.replace(writing, file)
    finally:
        writing.unlink(missing_ok=True)  # a full disk may have taken half of it


def read_json(file: Path) -> dict:
    """A JSON object, {} where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(file: Path, value: dict) -> None:
    """A JSON object, on the disk whole or not at all."""
    replace(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def feed(digest, file: Path) -> int:
    """Feed a file's content to a digest of hashlib, a block at a time: how many bytes it has."""
    with open(file, "rb") as content:
        for block in iter(lambda: content.read(2**20), b""):
            digest.update(block)
        return content.tell()
