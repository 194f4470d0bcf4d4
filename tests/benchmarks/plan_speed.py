"""Seconds to plan one epoch of a million pairs, and how full the micro-batches are.

    python -m tests.benchmarks.plan_speed --out docs/benchmarks/plan_speed.md
    ... --model MODEL --data pairs.jsonl.gz      lengths drawn from real pairs instead of a log-normal distribution

What is timed is everything that `rm.data.batch.Loader` computes to plan an epoch: the shuffle, each step's slice of the
lengths and costs, and `plan_micro_batches` for all ranks. Packing tokens into tensors is not part of it. One process,
NumPy and Python only.
"""

import argparse
import itertools
import math
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
    of_replies = replies * (replies + 1) // 2 + replies * prefixes[:, None]
    attention_pairs = prefixes * (prefixes + 1) // 2 + of_replies.sum(1)
    costs = lengths + ATTENTION_COST * attention_pairs
    rows = []
    for size, world_size in itertools.product(args.batch_sizes, args.worlds):
        print(f"batch {size}, world size {world_size}", file=sys.stderr)
        rows.append([size, world_size, *epoch(lengths, costs, args, size, world_size)])
    head = ["pairs a step", "ranks", "steps", "epoch planned in, s", "ms a step", "micro-batches a step", "fill",
            "fill relative to the best possible", "costliest rank over mean"]  # fmt: skip
    page.add(
        f"{args.examples:,} pairs, {lengths.mean():.0f} tokens on average with a shared prefix (median "
        f"{np.median(lengths):.0f}, longest {lengths.max()}), micro-batches of {args.max_tokens} tokens, "
        f"{'lengths drawn from real pairs' if args.data else 'log-normal lengths'}.\n",
        table(head, rows),
        "\nFill is the number of tokens over the capacity of the micro-batches. A step of few tokens cannot fill a "
        "whole number of micro-batches on every rank; the second fill is relative to the smallest number that it needs."
        "\n",
    )
    page.finish()


def epoch(lengths: np.ndarray, costs: np.ndarray, args: argparse.Namespace, size: int, world_size: int) -> list[str]:
    """Plan one epoch; returns how long it took, how full the micro-batches are and how balanced the ranks."""
    began, plans = time.perf_counter(), []
    order = np.random.default_rng([args.seed, 0]).permutation(len(lengths))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        plans.append(plan_micro_batches(lengths[indices], costs[indices], args.max_tokens, world_size))
    seconds = time.perf_counter() - began
    count = sum(len(of_rank) for plan in plans for of_rank in plan)
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    needed = sum(fewest_micro_batches(lengths[indices].sum(), args.max_tokens, world_size) for indices in steps)
    uneven = [imbalance(plan, costs[indices]) for plan, indices in zip(plans[:200], steps, strict=False)]
    speed = [f"{len(plans):,}", f"**{seconds:.2f}**", f"{1000 * seconds / len(plans):.2f}", f"{count / len(plans):.1f}"]
    fill = lengths.sum() / (count * args.max_tokens)
    return [*speed, f"{fill:.3f}", f"{needed / count:.3f}", f"{np.mean(uneven):.3f}"]


def fewest_micro_batches(tokens: int, max_tokens: int, world_size: int) -> int:
    """That can hold the tokens of a step, as many on every rank."""
    return math.ceil(math.ceil(tokens / max_tokens) / world_size) * world_size


def imbalance(plan: list[list[list[int]]], costs: np.ndarray) -> float:
    """The cost of the costliest rank over the mean of all ranks."""
    of_ranks = [sum(costs[indices].sum() for indices in of_rank if indices) for of_rank in plan]
    return max(of_ranks) / np.mean(of_ranks)


def draw(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Prefix lengths (N,) and reply lengths (N, 2) of `--examples` pairs that fit --max_length."""
    random = np.random.default_rng(args.seed)
    if not args.data:  # HH-RLHF: prompts of 124 tokens on average, replies of 46, both with long tails
        n = 2 * args.examples
        prefixes, replies = random.lognormal(4.45, 0.85, n).astype(int) + 1, random.lognormal(3.6, 0.7, (n, 2))
        replies = replies.astype(int) + 1
    else:
        from rm.data import dataset
        from rm.data.encode import Task
        from rm.data.tokenizer import Tokenizer

        examples, _ = dataset.read(Task.PREFERENCE, args.data, Tokenizer(args.model), args.max_length)
        drawn = random.integers(len(examples), size=args.examples)
        prefixes, replies = examples.prefix_lengths[drawn], examples.reply_lengths.reshape(-1, 2)[drawn]
    fits = (prefixes + replies.max(1) <= args.max_length).nonzero()[0][: args.examples]
    return prefixes[fits], replies[fits]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face folder whose tokenizer is used for --data")
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
