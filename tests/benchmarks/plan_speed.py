"""Seconds to plan one epoch of a million pairs, and how full the rows are.

    python -m tests.benchmarks.plan_speed --out docs/benchmarks/plan_speed.md
    ... --model MODEL --data pairs.jsonl.gz      lengths drawn from real pairs instead of a log-normal likeness

What is timed is all that `rm.data.batch.Loader` does to decide an epoch: the shuffle, each step's slice of the
lengths and costs, and `plan` for all ranks; packing tokens into tensors is not planning. One process, NumPy and
Python only.
"""

import argparse
import itertools
import sys
import time

import numpy as np

from rm.data.batch import plan_micro_batches
from tests.benchmarks.common import Page, table

ATTENTION_COST = 0.000326  # of SmolLM2-135M, `ModelConfig.attention_cost`


def main() -> None:
    args = arguments()
    page = Page("Planning", args)
    prefixes, replies = draw(args)
    lengths = prefixes + replies.sum(1)
    sights = prefixes * (prefixes + 1) // 2 + (replies * (replies + 1) // 2 + replies * prefixes[:, None]).sum(1)
    costs = lengths + ATTENTION_COST * sights
    rows = []
    for size, world in itertools.product(args.batch_sizes, args.worlds):
        print(f"batch {size}, world {world}", file=sys.stderr)
        rows.append([size, world, *epoch(lengths, costs, args, size, world)])
    head = ["pairs a step", "ranks", "steps", "epoch planned in, s", "ms a step", "rows a step", "fill of the rows",
            "fill without the steps' own remainder", "costliest rank over mean"]  # fmt: skip
    page.add(
        f"{args.examples:,} pairs, {lengths.mean():.0f} tokens on average with a shared prefix (median "
        f"{np.median(lengths):.0f}, longest {lengths.max()}), rows of {args.max_tokens} tokens, "
        f"{'lengths drawn from real pairs' if args.data else 'log-normal lengths'}.\n",
        table(head, rows),
        "\nFill is tokens over room in the rows made. A step of few tokens cannot fill a whole number of rows on every "
        "rank; the second fill is against the least number of rows that it needs.\n",
    )
    page.finish()


def epoch(lengths: np.ndarray, costs: np.ndarray, args: argparse.Namespace, size: int, world: int) -> list[str]:
    """Plan one epoch, and say how long it took and how full and balanced it is."""
    began, plans = time.perf_counter(), []
    order = np.random.default_rng([args.seed, 0]).permutation(len(lengths))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        plans.append(plan_micro_batches(lengths[numbers], costs[numbers], args.max_tokens, world))
    seconds = time.perf_counter() - began
    made = sum(len(rank) for dealt in plans for rank in dealt)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    need = sum(-(-int(np.ceil(lengths[b].sum() / args.max_tokens)) // world) * world for b in batches)
    uneven = [balance(dealt, costs[b]) for dealt, b in zip(plans[:200], batches, strict=False)]
    speed = [f"{len(plans):,}", f"**{seconds:.2f}**", f"{1000 * seconds / len(plans):.2f}", f"{made / len(plans):.1f}"]
    fill = lengths.sum() / (made * args.max_tokens)
    return [*speed, f"{fill:.3f}", f"{need / made:.3f}", f"{np.mean(uneven):.3f}"]


def balance(dealt: list[list[list[int]]], costs: np.ndarray) -> float:
    ranks = [sum(costs[row].sum() for row in map(np.array, rows) if len(row)) for rows in dealt]
    return max(ranks) / np.mean(ranks)


def draw(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Prefix lengths (N,) and reply lengths (N, 2) of `--examples` pairs that fit --max_length."""
    random = np.random.default_rng(args.seed)
    if not args.data:  # HH-RLHF: prompts of 124 tokens on average, replies of 46, both with long tails
        n = 2 * args.examples
        prefixes, replies = random.lognormal(4.45, 0.85, n).astype(int) + 1, random.lognormal(3.6, 0.7, (n, 2))
        replies = replies.astype(int) + 1
    else:
        from rm.data import dataset
        from rm.data.tokenizer import Tokenizer

        examples, _ = dataset.pairs(args.data, Tokenizer(args.model), args.max_length)
        drawn = random.integers(len(examples), size=args.examples)
        prefixes, replies = examples.prefix_lengths[drawn], examples.reply_lengths.reshape(-1, 2)[drawn]
    fits = (prefixes + replies.max(1) <= args.max_length).nonzero()[0][: args.examples]
    return prefixes[fits], replies[fits]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face folder: its tokenizer cuts --data")
    add("--data", nargs="+", help="files of preference pairs")
    add("--examples", type=int, default=1_000_000)
    add("--max_length", type=int, default=512)
    add("--max_tokens", type=int, default=4096)
    add("--batch_sizes", type=int, nargs="+", default=[64, 512])
    add("--worlds", type=int, nargs="+", default=[1, 8])
    add("--seed", type=int, default=0)
    add("--out", help="also write the page to this file")
    args = parser.parse_args()
    args.threads = 1
    return args


if __name__ == "__main__":
    main()
