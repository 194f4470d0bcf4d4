"""Metrics for the tools people have: metrics.csv always, TensorBoard or Weights & Biases where `--report_to` asks."""

import csv
import importlib.util
import json
import os
import secrets
from pathlib import Path

from rm.files import replace

TOOLS = ("none", "tensorboard", "wandb")


def check_installed(tool: str) -> None:
    """A tool that is asked for must be there before anything long begins."""
    if tool != "none" and importlib.util.find_spec(tool) is None:
        raise ValueError(f"--report_to {tool}: the package {tool} is not installed; pip install {tool}, or use none")


class Nowhere:
    """Takes lines of metrics as the journal does: write, close."""

    def write(self, line: dict) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(Nowhere):
    """Event files in output_dir/tensorboard; a run that goes on from a step hides what was written after it."""

    def __init__(self, folder: Path, step: int, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB(Nowhere):
    """A run of Weights & Biases, which its own variables govern: WANDB_PROJECT, WANDB_MODE=offline, ..."""

    def __init__(self, folder: Path, step: int, settings: dict):
        import wandb

        known = folder / "wandb_run_id"  # so that a run which goes on is one run there too
        if not known.is_file():
            replace(known, secrets.token_hex(4))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rm"), name=folder.name, dir=str(folder), config=settings,
            id=known.read_text(), resume="allow",
        )  # fmt: skip

    def write(self, line: dict) -> None:
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def tracker(tool: str, folder: Path, step: int, settings: dict) -> Nowhere:
    """Where lines go beside the journal: of the main process alone.

    Args:
        step: that the run begins after.
    """
    if tool == "none":
        return Nowhere()
    return {"tensorboard": TensorBoard, "wandb": WandB}[tool](folder, step, settings)


def write_csv(journal: Path) -> None:
    """metrics.csv beside metrics.jsonl: a row a line, a column for every name that any line has."""
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(journal.with_suffix(".csv"), "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, names)
        table.writeheader()
        table.writerows(lines)
