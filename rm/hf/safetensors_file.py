"""Opening a safetensors file, with an error message that says what to do if it is damaged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


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
