"""AdamW's states in bfloat16 against float32: the same training, several times.

    python -m tests.benchmarks.short_states --model stories260K --data pairs.jsonl.gz --out docs/benchmarks/...

Each run is `train_sft.py` on the chosen texts, all weights in float32 and at a constant rate behind the warmup. Beside
stochastic rounding there is rounding to the nearest, which is not offered, and a run in float32 with another seed: by
how much runs differ that nobody would tell apart.
"""

import gzip
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import train_sft
from rm.config import parse
from rm.distributed import process_group as dist
from rm.training import optim
from tests.benchmarks.common import Page, flags, table

SHORT = ["--optimizer_state_dtype", "bfloat16"]
RUNS = {
    "float32": [],
    "float32, another seed": ["--seed", "1"],
    "bfloat16, rounded stochastically": SHORT,
    "bfloat16, rounded to the nearest": SHORT,
}


def texts(files: list[str], records: int, out: Path) -> Path:
    with open(out, "w") as lines:
        for file in files:
            with gzip.open(file, "rt") as stored:
                for _, line in zip(range(records), stored, strict=False):
                    record = json.loads(line)
                    lines.write(json.dumps({"text": record.get("chosen") or record["positive"]}) + "\n")
    return out


def train(args, data: Path, out: Path, more: list[str]) -> tuple[list[dict], dict[str, Tensor]]:
    """The lines of metrics, and the trained weights."""
    words = ["--model_name_or_path", args.model, "--dataset_path", str(data), "--output_dir", str(out),
             "--cache_dir", str(data.parent / "cache"), "--validation_split_percentage", "5", "--seed", str(args.seed),
             "--dtype", "float32", "--max_length", str(args.max_length), "--max_steps", str(args.steps),
             "--logging_steps", "1", "--save_steps", "0", "--lr_scheduler_type", "constant",
             *args.ours.split(), *more]  # fmt: skip
    train_sft.write_report = lambda folder, if_missing=False: None
    settings = parse(train_sft.Settings, "", words)
    with dist.session(settings.run.seed):
        train_sft.main(settings)
    return [json.loads(line) for line in open(out / "metrics.jsonl")], load_file(out / "model" / "model.safetensors")


def main() -> None:
    args = flags(__doc__, steps=200).parse_args()
    torch.set_num_threads(args.threads)
    page, rows, first, stochastic = Page("AdamW's states in bfloat16", args), [], None, optim.round_stochastically
    with tempfile.TemporaryDirectory() as name:
        data = texts(args.data, args.records, Path(name) / "texts.jsonl")
        start = load_file(Path(args.model) / "model.safetensors")
        for number, (run, more) in enumerate(RUNS.items()):
            optim.round_stochastically = (lambda x, *_: x) if run.endswith("nearest") else stochastic
            lines, model = train(args, data, Path(name) / f"run{number}", more)
            losses = torch.tensor([line["loss"] for line in lines if "loss" in line])
            first = first or (losses, model)
            gaps = (losses - first[0]).abs()
            apart, moved = (sum((model[k] - x[k].float()).square().sum() for k in model) ** 0.5
                            for x in (first[1], {k: start.get(k, model[k]) for k in model}))  # fmt: skip
            held_out = next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line)
            rows.append([run, f"{losses[-50:].mean():.5f}", f"{held_out:.5f}", f"{gaps.mean():.1e}",
                         f"{gaps.max():.1e}", f"{moved:.3f}", f"{apart / moved:.3f}"])  # fmt: skip
    head = ["states", "loss, mean of the last 50 steps", "held-out loss", "mean gap of a step's loss", "largest gap",
            "distance moved", "distance from the first run, of that moved"]  # fmt: skip
    page.add(table(head, rows))
    page.finish()


if __name__ == "__main__":
    main()
