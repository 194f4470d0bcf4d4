"""Reading what a training run has written so far."""

import json
from pathlib import Path


def read_metrics(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl, [] if there is no such file."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last line, if the run is writing it at this moment
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]
