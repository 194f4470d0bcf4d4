"""Training steps on the pairs of a prompt together (--group_by_prompt), against the same pairs one by one, in one run.

    python -m tests.benchmarks.grouped --model MODEL --data RM-Bench/data/*_filtered.json --out docs/benchmarks/PAGE.md

The data is RM-Bench's: every record has three chosen and three rejected replies, and is read as its nine pairs. Both
sides train the same model in turns, step by step on the same pairs, with micro-batches of the same --max_tokens.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rm.data import dataset
from rm.data.batch import (
    BatchSettings,
    Loader,
    PackingSettings,
    PreferenceBatchSettings,
    StepBatches,
    pack,
    plan_micro_batches,
)
from rm.data.chat import choose_template
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.model.heads import RewardModel
from rm.training import optim
from rm.training.optim import OptimSettings
from tests.benchmarks.common import Page, flags, table
from train_rm import train_step


def main() -> None:
    parser = flags(__doc__, steps=4)
    parser.add_argument("--pairs", type=int, default=36, help="pairs of a step, or a few more (default: 36)")
    parser.add_argument("--max_tokens", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    page = Page("Pairs of one prompt together, and one by one", args)
    with dist.session(args.seed):
        examples = read(args)
        page.add(
            f"{len(examples):,} pairs of {len(set(examples.prompt.tolist())):,} prompts.\n", compare(args, examples)
        )
    page.finish()


def read(args) -> Examples:
    """RM-Bench's records as pairs."""
    tokenizer = Tokenizer(args.model)
    records = [record for file in args.data for record in json.loads(Path(file).read_text())][: args.records]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        with open(file, "w") as out:
            for record in records:
                for chosen, rejected in itertools.product(record["chosen"], record["rejected"]):
                    pair = {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected}
                    out.write(json.dumps(pair) + "\n")
        template = choose_template(None, None, tokenizer)
        examples, report = dataset.read(
            Task.PREFERENCE, [file], tokenizer, args.max_length, template, with_prompts=True
        )
    print(report)
    return examples


def one_by_one(loader: Loader, indices: Sequence[int], seed: int) -> StepBatches:
    """A step on these pairs, each an example of its own."""
    plan = plan_micro_batches(loader.lengths[indices], loader.costs[indices], loader.packing.max_tokens, 1)[0]
    micro_batches = [pack(loader.examples, [indices[i] for i in some]) for some in plan]
    return StepBatches(micro_batches, len(indices), 0, int(loader.lengths[indices].sum()), seed)


def compare(args, examples: Examples) -> str:
    packing = PackingSettings(max_tokens=args.max_tokens)
    models, optimizers = [], []
    for _ in range(2):
        model = build.build(RewardModel, args.model, ParallelSettings(dtype="float32"), training=build.Training())
        models.append(build.load(model, args.model, seed=args.seed))
        optimizers.append(optim.adamw(model, OptimSettings()))
    cost = models[0].config.attention_cost
    settings = PreferenceBatchSettings(global_batch_size=args.pairs, group_by_prompt=True)
    grouped = Loader(examples, settings, packing, args.seed, cost)
    alone = Loader(examples, BatchSettings(), packing, args.seed, cost)
    rows, ratios, gaps = [], [], []
    for step in range(args.warmup + args.steps):
        together = grouped.at(step)
        indices = [i for part in grouped.indices(step) for i in grouped.groups.members_of(part)]
        seconds, losses = [], []
        for model, optimizer, batches in zip(
            models, optimizers, (together, one_by_one(alone, indices, together.seed)), strict=True
        ):
            began = time.perf_counter()
            sums, _ = train_step(model, optimizer, batches, 1.0)
            losses.append(sums["loss"].item() / len(indices))
            seconds.append(time.perf_counter() - began)
            rows.append(batches.num_tokens)
        tokens = rows[-2:]
        rows[-2:] = [
            [f"{step}{' (warm-up)' if step < args.warmup else ''}", len(indices), together.num_prompts, *tokens,
             f"{tokens[1] / tokens[0]:.2f}", *(f"{s:.2f}" for s in seconds), f"{seconds[1] / seconds[0]:.2f}",
             *(f"{loss:.6f}" for loss in losses)]
        ]  # fmt: skip
        gaps.append(abs(losses[0] - losses[1]))
        if step >= args.warmup:
            ratios.append(seconds[1] / seconds[0])
    head = ["step", "pairs", "prompts", "tokens together", "one by one", "ratio", "s together", "one by one", "ratio",
            "loss together", "one by one"]  # fmt: skip
    found = f"Speed, median of the timed steps: **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to "
    found += f"{max(ratios):.2f}). Gap of the losses: {gaps[0]:.1e} in the first step, at most {max(gaps):.1e}.\n"
    return "\n".join([table(head, rows), found])


if __name__ == "__main__":
    main()
