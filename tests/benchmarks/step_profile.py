"""Where the time of a reward-model step goes, and how many more tokens a padded step computes.

    python -m tests.benchmarks.step_profile --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/step_profile.md

A step of `train_rm.py` is profiled operator by operator (self CPU time; the profiler itself slows the small ones most).
The page also has the number of tokens that any trainer with padding must compute: for batches drawn at random, two
texts a pair, each padded to the longest text of the batch. A trainer that computes the same mathematics at the same
rate per token is slower by that ratio.
"""

import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import train_rm
from rm.config import parse
from rm.data import dataset
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, table
from tests.benchmarks.turns import in_child

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach"),
    "copies: packing, rotary halves, shards": (
        "aten::cat", "aten::copy_", "aten::split_with_sizes_copy", "aten::_chunk_cat",
    ),
    "activations, products of numbers, sums": (
        "aten::mul", "aten::add", "aten::silu", "aten::sum", "aten::addcmul", "aten::div", "aten::sub", "aten::rsqrt",
        "aten::mean", "aten::pow", "aten::neg",
    ),
    "memory: empty, zero, fill": ("aten::empty", "aten::zero", "aten::fill", "aten::new_"),
}  # fmt: skip


def main() -> None:
    args = arguments()
    page = Page(f"Where a reward-model step's time goes, {'bf16' if args.bf16 else 'fp32'}", args)
    folder = Path(tempfile.mkdtemp())
    try:
        in_child(profiled, args, str(folder))
        times = torch.load(folder / "times", weights_only=True)
    finally:
        shutil.rmtree(folder)
    whole = sum(times.values())
    rows = [[kind, f"{seconds:.2f}", f"{seconds / whole:.0%}"] for kind, seconds in times.items()]
    ratios = padding(args)
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    page.add(
        f"{args.batch_pairs} pairs a step, pairs over {args.max_length} tokens left out, micro-batches of at most "
        f"{args.max_tokens} tokens; step {args.warmup + 1} of a run, {args.threads} threads.\n",
        table(["operators", "seconds", "share"], rows),
        f"Tokens that a padded step computes over those that ours does, in {len(ratios)} random batches of "
        f"{args.batch_pairs} pairs: mean **{ratios.mean():.2f}**, median {middle:.2f}, a tenth below {low:.2f} and a "
        f"tenth above {high:.2f}.\n",
    )
    page.finish()


def profiled(args: Namespace, folder: str) -> None:
    """Seconds of each kind of operator in one step, written to a file."""
    torch.set_num_threads(args.threads)
    turns, seen = args.warmup + 3, 0
    file, _ = training.choose(args, args.model, args.batch_pairs, turns - 2, Task.PREFERENCE, Path(folder))

    train_step = train_rm.train_step  # the script's own, which is replaced below

    def step(*arguments) -> tuple:
        nonlocal seen
        seen += 1
        if seen != args.warmup + 1:
            return train_step(*arguments)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = train_step(*arguments)
        times = dict.fromkeys([*KINDS, "everything else"], 0.0)
        for event in profiler.key_averages():
            kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "everything else")
            times[kind] += event.self_cpu_time_total / 1e6
        torch.save(times, Path(folder, "times"))
        return result

    train_rm.train_step = step
    words = training.our_flags(args, args.model, file, args.batch_pairs, turns, Path(folder, "run"))
    settings = parse(train_rm.Settings, "", words)
    with dist.session(settings.run.seed):
        train_rm.main(settings)


def padding(args: Namespace, batches: int = 1000) -> np.ndarray:
    """(batches,) padded tokens over ours, for random batches of the files' pairs."""
    examples: Examples = dataset.read(Task.PREFERENCE, args.data, Tokenizer(args.model), args.max_length)[0]
    texts = examples.prefix_lengths.repeat(2).reshape(-1, 2) + examples.reply_lengths.reshape(-1, 2)  # (pairs, 2)
    drawn = np.random.default_rng(args.seed).integers(len(texts), size=(batches, args.batch_pairs))
    return 2 * args.batch_pairs * texts[drawn].max((1, 2)) / examples.lengths[drawn].sum(1)


def arguments() -> Namespace:
    parser = flags(__doc__)
    add = parser.add_argument
    add("--batch_pairs", type=int, default=8, help="pairs a step (default: 8)")
    add("--max_tokens", type=int, default=2048, help="tokens a micro-batch (default: 2048)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
