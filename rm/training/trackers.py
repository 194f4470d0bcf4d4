"""Metrics for other tools: metrics.csv always, TensorBoard or Weights & Biases where `--report_to` names one."""

import csv
import importlib.util
import io
import os
import secrets
import sys
from pathlib import Path

from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.run_files import read_metrics
from rm.terminal import without_secrets_in

TOOLS = ("none", "tensorboard", "wandb")


def check_installed(tool: str) -> None:
    """Raise ValueError where the tool's package is missing, before anything long begins."""
    if tool != "none" and importlib.util.find_spec(tool) is None:
        raise ValueError(f"--report_to {tool}: the package {tool} is not installed; pip install {tool}, or use none")


def log_in(tool: str) -> None:
    """Raise ValueError where the tool will not take this user's metrics, before anything long begins.

    All ranks call it.
    """
    if tool == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        dist.on_main(_log_in_to_wandb)


def _log_in_to_wandb() -> None:
    import wandb

    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return ValueError(f"--report_to wandb: {reason}. Without its server: WANDB_MODE=offline, or --report_to none")


class NoTracker:
    """The interface of a tracker, which takes the lines of metrics.jsonl; it does nothing with them."""

    def write(self, line: dict) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(NoTracker):
    """Event files in output_dir/tensorboard; a resumed run hides what was written after its first step."""

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


class WandB(NoTracker):
    """A run of Weights & Biases, configured by its environment variables: WANDB_PROJECT, WANDB_MODE=offline, ..."""

    def __init__(self, folder: Path, step: int, settings: dict):
        import wandb

        run_id = folder / "wandb_run_id"  # kept, so that a resumed run is one run there, too
        if not run_id.is_file():
            write_atomically(run_id, secrets.token_hex(4))
        sys.argv[:] = without_secrets_in(sys.argv)  # wandb.init records the command line
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rm"), name=folder.name, dir=str(folder), config=settings,
                id=run_id.read_text(), resume="allow",
            )  # fmt: skip
        except wandb.Error as error:
            raise _refusal(error) from None

    def write(self, line: dict) -> None:
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def tracker(tool: str, folder: Path, step: int, settings: dict) -> NoTracker:
    """The tracker that `--report_to` names. Only the main process calls it.

    Args:
        step: that the run starts from.
    """
    if tool == "none":
        return NoTracker()
    return {"tensorboard": TensorBoard, "wandb": WandB}[tool](folder, step, settings)


def write_csv(metrics_file: Path) -> None:
    """Write metrics.csv beside metrics.jsonl, with a column for every name that occurs in any line.

    Spreadsheets take a cell that begins like a formula for one: an apostrophe before it says that it is text.
    """
    lines = read_metrics(metrics_file)
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name for name in names)
    table.writerows([line.get(name) for name in names] for line in lines)
    write_atomically(metrics_file.with_suffix(".csv"), text.getvalue())
