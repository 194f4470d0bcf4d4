"""metrics.jsonl, a line at a time, which outlives a killed process."""

import contextlib
import json
import os
import sys
from pathlib import Path

from rm.files import replace


class MetricsFile:
    """Objects with a `step`, one JSON line each. A run that goes on from a step drops the lines after it."""

    def __init__(self, file: Path, step: int):
        """Read what is there up to `step`; nothing is changed before `begin`."""
        self.file, self.waiting = file, ""
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.kept = [line for line in lines if (at := _step(line)) is not None and at <= step]

    def has(self, step: int, prefix: str) -> bool:
        """Whether there was a line of this step with a name that begins so."""
        return any(_step(line) == step and f'"{prefix}' in line for line in self.kept)

    def begin(self) -> None:
        """Cut the file back to what is kept."""
        replace(self.file, "".join(f"{line}\n" for line in self.kept))

    def write(self, line: dict) -> None:
        """Append a line. A full disk does not end the run: what could not be written is tried again with the next."""
        self.waiting += json.dumps(line) + "\n"
        whole = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.file, whole)  # a part may have been written
            print(f"{self.file}: {error}; it will be tried again with the next line", file=sys.stderr, flush=True)


def _step(line: str) -> int | None:
    """A line's step; None of a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
