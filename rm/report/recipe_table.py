"""The table of the HH-RLHF recipe, from the evaluations below a folder: accuracy by epochs of SFT and rank of LoRA.

python -m rm.report.recipe_table OUT    reads OUT/sft_E_lora_R/eval/report.json, as launch/hh_table.sh leaves them, and
                                        writes OUT/table.md and OUT/table.svg (which needs matplotlib)
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

from rm import json_keys
from rm.cli import one_line_errors
from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.json_keys import Key
from rm.report import figures
from rm.report.evaluation import accuracy_interval
from rm.report.html import format_value, markdown_table
from rm.run_files import INTERVAL, SET

Cells = dict[tuple[float, int], dict]  # (epochs of SFT, rank) -> {"n", "accuracy", "ci95"}
KEYS = SET | {
    "accuracy": Key(float, required=True),
    "accuracy_ci95": replace(INTERVAL, required=True),
}  # of report.json
NOTE = """
Accuracy on {n} test pairs, with its 95 % interval{clustered}. "–": not evaluated yet.
"""


def read_cells(folder: Path) -> Cells:
    """The evaluations of a folder.

    Raises:
        ValueError: there is none.
    """
    cells = {}
    for file in folder.glob("sft_*_lora_*/eval/report.json"):
        name = re.fullmatch(r"sft_([\d.]+)_lora_(\d+)", file.parent.parent.name)
        if name:
            report = json_keys.read(file, KEYS, others=True)
            cells[float(name[1]), int(name[2])] = {
                "n": report["n"],
                "accuracy": report["accuracy"],
                "ci95": accuracy_interval(report),
                "is_clustered": report.get("accuracy_ci95_clustered") is not None,
            }
    if not cells:
        raise ValueError(f"{folder} has no sft_E_lora_R/eval/report.json; launch/hh_table.sh makes them")
    return dict(sorted(cells.items()))


def as_markdown(cells: Cells) -> str:
    """One row for each number of epochs, one column for each rank."""
    epochs, ranks = sorted({epoch for epoch, _ in cells}), sorted({rank for _, rank in cells})
    rows = [[f"{epoch:g}", *(_as_text(cells.get((epoch, rank))) for rank in ranks)] for epoch in epochs]
    table = markdown_table(["epochs of SFT", *(f"LoRA, rank {rank}" for rank in ranks)], rows)
    sizes = sorted({cell["n"] for cell in cells.values()})  # models with other tokenizers leave out other texts
    clustered = " over conversations" if all(cell["is_clustered"] for cell in cells.values()) else ""
    return table + NOTE.format(
        n=" to ".join(f"{n:,}" for n in (sizes[0], sizes[-1])[: len(sizes)]), clustered=clustered
    )


def _as_text(cell: dict | None) -> str:
    return "–" if cell is None else f"{format_value(cell['accuracy'])} ({format_value(cell['ci95'])})"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with one_line_errors():
        folder = Path(sys.argv[1])
        cells = read_cells(folder)
        write_atomically(folder / "table.md", as_markdown(cells))
        for line in (f"{folder / 'table.md'}:", *as_markdown(cells).splitlines()):
            dist.say(line)
        try:
            write_atomically(folder / "table.svg", figures.by_epochs_of_sft(cells))
        except ImportError:
            dist.say("no figure: pip install matplotlib")


if __name__ == "__main__":
    main()
