"""What a run leaves in its folder besides weights, read as files of others are: a disk or a person may have changed it.

run.json         settings, versions, data, starts
metrics.jsonl    an object with a step for each line
exit.json        how the run ended
report.json      of an evaluation
"""

import json
from pathlib import Path

from rm.json_keys import Key, check_keys, read
from rm.terminal import warn

LONGEST_LINE = 2**20  # bytes of a line of metrics.jsonl
COUNT = Key(int, minimum=0)
DATA = {
    "kept": COUNT,
    "formats": Key(dict, items=COUNT),
    "dropped": Key(dict, items=COUNT),
    "shortened": COUNT,
    "sets": Key(dict),
}
RUN = {
    "settings": Key(dict),
    "given": Key(dict),  # settings whose values are names on the hub, or runs, of which "settings" has the paths
    "processes": Key(int, minimum=1),
    "device": Key(str),
    "versions": Key(dict, items=Key(str)),
    "started": Key(str),
    "starts": Key(list, items=Key(dict)),
    "data": Key(dict, keys={"train": Key(dict, keys=DATA, others=True), "held_out": Key(dict, keys=DATA, others=True)},
                others=True),
    "best_evaluation": Key(dict, keys={"step": COUNT}, others=True),
    "model_step": COUNT,
}  # fmt: skip
LINE = {"step": Key(int, minimum=0, required=True)}
EXIT = {"status": Key(str)}
INTERVAL = Key(list, items=Key(float))
SCORE = {  # of a benchmark, or of a section of one
    "prompts": COUNT,
    "score": Key(float, required=True),
    "ci95_clustered": Key(list, items=Key(float), required=True),
    "baseline": Key(dict),
}
BENCHMARK = {
    "name": Key(str, required=True),
    "absent": Key(list, items=Key(str)),
    "sections": Key(dict, items=Key(dict, keys=SCORE, others=True), required=True),
}
SET = {
    "n": Key(int, minimum=0, required=True),
    "accuracy": Key(float),
    "accuracy_ci95": INTERVAL,
    "accuracy_ci95_clustered": INTERVAL,
    "length": Key(dict, keys={"longest_accuracy": Key(float), "controlled_accuracy": Key(float)}, others=True),
    "benchmark": Key(dict, keys=SCORE | BENCHMARK, others=True),
}  # fmt: skip
EVALUATION = {
    "settings": Key(dict),
    "benchmarks": Key(dict, keys=SCORE | {"sets": Key(int, required=True)}, others=True),
    "sets": Key(dict, items=Key(dict, keys=SET, others=True), required=True),
}


def read_run(folder: Path) -> dict:
    """run.json, {} if there is none; declared keys that are null are left out."""
    return _without_nulls(read(folder / "run.json", RUN, others=True), RUN)


def _without_nulls(content: dict, keys: dict[str, Key]) -> dict:
    kept = {name: value for name, value in content.items() if value is not None or name not in keys}
    inner = {name: keys[name].keys for name in kept if name in keys and keys[name].keys}
    return kept | {name: _without_nulls(kept[name], of) for name, of in inner.items()}


def read_exit(folder: Path) -> dict:
    """exit.json, {} if there is none."""
    return read(folder / "exit.json", EXIT, others=True)


def read_evaluation(folder: Path) -> dict:
    """report.json, {} if there is none."""
    return read(folder / "report.json", EVALUATION, others=True)


def read_metrics(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl, [] if there is no such file.

    Damaged lines are left out, and named unless it is the last one, which a run may be writing at this moment.

    Raises:
        ValueError: a line has more than `LONGEST_LINE` bytes.
    """
    if not file.is_file():
        return []
    lines = []
    with open(file, "rb") as opened:
        for number, text in enumerate(iter(lambda: opened.readline(LONGEST_LINE), b""), start=1):
            if len(text) == LONGEST_LINE:
                raise ValueError(f"{file} line {number} has {LONGEST_LINE:,} bytes or more: the file holds no metrics")
            try:
                lines.append(_line(text.decode(errors="replace")))
            except ValueError as error:
                if text.endswith(b"\n"):
                    warn(f"{file} line {number} is left out: {error}")
    return lines


def _line(text: str) -> dict:
    try:
        line = json.loads(text)
    except RecursionError:
        raise ValueError("lists in lists without end") from None
    if not isinstance(line, dict):
        raise ValueError("it is not a JSON object")
    check_keys("its keys", line, LINE, others=True)
    if wrong := [name for name, value in line.items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{wrong[0]} is not a number")
    return line
