"""The cost of checkpoints: training the quickstart's reward model with and without them, in turns.

    python -m tests.benchmarks.checkpoint_cost [--rounds 3] [--steps 300] [--save_steps 50] [--out PAGE]

Every run is `train_rm.py` itself in a process of its own, so that start-up is not counted: steps per second are those
of metrics.jsonl, over all lines but the first.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rm.distributed import checkpoint
from tests.benchmarks.common import MIB, Page, table

ROOT = Path(__file__).parents[2]


def run(world: Path, out: Path, args: argparse.Namespace, save_steps: int) -> list[dict]:
    """The lines of training of a run of the quickstart's settings."""
    flags = f"""--model_name_or_path {world}/model --dataset_path {world}/rm_train.jsonl --output_dir {out}
        --learning_rate 4e-4 --num_train_epochs 100 --max_steps {args.steps} --global_batch_size 16
        --logging_steps {args.save_steps} --save_steps {save_steps}""".split()
    subprocess.run([sys.executable, "train_rm.py", *flags], cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [line for line in lines if "loss" in line]


def rate(lines: list[dict]) -> float:
    """Steps per second over all lines but the first, which includes the start."""
    return len(lines[1:]) / sum(16 / line["pairs_per_second"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    page = Page("Cost of checkpoints", args)
    rows, blocked, written = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "rm.demo", folder / "world"], cwd=ROOT, check=True, capture_output=True)
        for turn in range(args.rounds):
            without = run(folder / "world", folder / f"without{turn}", args, 0)
            saving = run(folder / "world", folder / f"saving{turn}", args, args.save_steps)
            same = [line["loss"] for line in without] == [line["loss"] for line in saving]
            fast, slow = rate(without), rate(saving)
            rows.append([turn, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.3f}", same])
            count = args.steps // args.save_steps
            blocked.append(sum(line.get("checkpoint_blocked_seconds", 0) for line in saving) / count)
            written.append(sum(line.get("checkpoint_seconds", 0) for line in saving) / count)
        newest = checkpoint.list_checkpoints(folder / "saving0" / "checkpoints")[-1]
        state = checkpoint.read(newest)
        trained = sum(math.prod(p["shape"]) for p in state["parameters"].values())
        size = sum(file.stat().st_size for file in newest.iterdir())
    head = ["turn", "steps/s, no checkpoints", f"steps/s, one every {args.save_steps}", "ratio", "same losses"]
    ratios = [float(row[3]) for row in rows]
    page.add(
        table(head, rows),
        f"Ratio: median **{statistics.median(ratios):.3f}**. The loop was blocked for "
        f"**{statistics.median(blocked):.4f} s** a checkpoint, which a thread wrote in "
        f"{statistics.median(written):.3f} s.\n",
        f"A checkpoint has {size / MIB:.1f} MiB, **{size / trained:.2f} bytes** for each of the {trained:,} trained "
        "parameters: 12 are the fp32 weight and Adam's two moments.\n",
    )
    page.finish()


if __name__ == "__main__":
    main()
