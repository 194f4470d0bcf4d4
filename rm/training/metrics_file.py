"""metrics.jsonl, one JSON line at a time, which survives a killed process."""

import contextlib
import json
import os
from pathlib import Path

from rm.files import write_atomically
from rm.run_files import read_metrics
from rm.terminal import warn


class MetricsFile:
    """Objects with a `step`, one JSON line each. A run that resumes from a step drops the lines after it."""

    def __init__(self, file: Path, step: int):
        """Read the lines up to `step`; the file is not changed before `begin`."""
        self.file, self.unwritten = file, ""
        self.kept = [line for line in read_metrics(file) if line["step"] <= step]

    def has_evaluation(self, step: int) -> bool:
        return any(_is_evaluation(line, step) for line in self.kept)

    def forget_evaluation(self, step: int) -> None:
        """Keep no line of an evaluation of this step."""
        self.kept = [line for line in self.kept if not _is_evaluation(line, step)]

    def begin(self) -> None:
        """Truncate the file to the kept lines."""
        write_atomically(self.file, "".join(f"{json.dumps(line)}\n" for line in self.kept))

    def write(self, line: dict) -> None:
        """Append a line. A full disk does not end the run: what could not be written is tried again with the next."""
        self.unwritten += json.dumps(line) + "\n"
        try:
            self.flush()
        except OSError as error:
            warn(f"{self.file}: {error}; it will be tried again with the next line")

    def flush(self) -> None:
        """Write the lines that could not be written before. Raises OSError where that fails again."""
        if not self.unwritten:
            return
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(self.unwritten)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.file, size)  # a part may have been written
            raise
        self.unwritten = ""


def _is_evaluation(line: dict, step: int) -> bool:
    return line["step"] == step and any(name.startswith("eval_") for name in line)
