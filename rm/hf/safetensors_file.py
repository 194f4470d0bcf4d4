"""Reading and writing safetensors files, with error messages that say what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rm.files import names_file, sync


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file for reading; its tensors are read only when they are indexed.

    Raises:
        ValueError: the file cannot be opened or read, or lacks a tensor that is read from it.
    """
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): copy or download it again") from error


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file, and flush it to disk. Raises OSError where that fails, as on a full disk."""
    with names_file(file):
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    sync(file)
