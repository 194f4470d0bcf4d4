"""What a pair costs our reward-model step, and its peak memory, as pairs a batch, length and depth grow.

    python -m tests.benchmarks.scaling --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/scaling.md
    ... --sweep pairs     only one of the three: pairs, length, depth

Within a sweep every configuration is a process of its own and they take turns step by step; the next sweep starts when
they are gone. At fixed --max_tokens memory must not grow with the pairs of a batch.
"""

import shutil
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

from rm.data.encode import Task
from tests.benchmarks import training
from tests.benchmarks.common import MIB, Page, flags, table
from tests.benchmarks.turns import Contender, interleave

SWEEPS = {
    "pairs": "Pairs a batch",
    "length": "Longest text allowed; longer pairs are left out, so that the population changes too",
    "depth": "Layers, the model's first ones",
}


def main() -> None:
    args = arguments()
    page = Page("Reward model: cost of a pair and peak memory", args)
    page.add(
        f"Full fine-tuning, {'bf16' if args.bf16 else 'fp32'}, micro-batches of at most {args.max_tokens} tokens"
        f"{' and ' + args.ours if args.ours else ''}; where a table does not say otherwise {args.batch_pairs} pairs a "
        f"batch, {args.max_length} tokens and {args.layers or 'all'} layers; {args.warmup} warm-up.\n"
    )
    for sweep, title in SWEEPS.items():
        if args.sweep in (None, sweep):
            values = {"pairs": args.pairs, "length": args.lengths, "depth": args.depths}[sweep]
            page.add(f"## {title}\n", measure(args, sweep, values))
    page.finish()


def measure(args: Namespace, sweep: str, values: list[int]) -> str:
    """One table: a row for each value."""
    name = {"pairs": "batch_pairs", "length": "max_length", "depth": "layers"}[sweep]
    cases = [Namespace(**vars(args) | {name: value}) for value in values]
    folder = Path(tempfile.mkdtemp())
    try:
        contenders = [start(case, folder / str(value)) for case, value in zip(cases, values, strict=True)]
        interleave(contenders, args.warmup + args.steps)
    finally:
        shutil.rmtree(folder)
    rows = [
        [value, *cost(contender, args.warmup, case.batch_pairs)]
        for value, case, contender in zip(values, cases, contenders, strict=True)
    ]
    head = [sweep, "tokens a pair", "wall s a pair: mean of the turns (min)", "CPU s a pair (min)", "wall ms a token",
            "peak RSS above loaded, MiB", "allocator's peak in a step, MiB", "RSS when loaded, MiB",
            "cores used by others"]  # fmt: skip
    return table(head, rows)


def start(case: Namespace, folder: Path) -> Contender:
    folder.mkdir()
    model, steps = training.first_layers(case.model, case.layers, folder / "layers"), case.warmup + case.steps + 2
    file, _ = training.choose(case, model, case.batch_pairs, steps - 2, Task.PREFERENCE, folder)
    words = training.our_flags(case, model, file, case.batch_pairs, steps, folder / "ours")
    return Contender(folder.name, case.threads, training.ours, "train_rm", words)


def cost(contender: Contender, warmup: int, pairs: int) -> list[str]:
    wall, cpu, tokens = (contender.of(name, warmup) for name in ("wall", "cpu", "tokens"))
    seconds = [f"{statistics.mean(x) / pairs:.3f} ({min(x) / pairs:.3f})" for x in (wall, cpu)]
    sizes = [f"{x / MIB:,.0f}" for x in (contender.peak, contender.allocated, contender.loaded)]
    others = f"{statistics.mean(contender.of('others', warmup)):.2f}"
    return [f"{statistics.mean(tokens) / pairs:.0f}", *seconds, f"{1000 * sum(wall) / sum(tokens):.2f}", *sizes, others]


def arguments() -> Namespace:
    parser = flags(__doc__, steps=2)
    add = parser.add_argument
    add("--sweep", choices=SWEEPS, help="only this one")
    add("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    add("--lengths", type=int, nargs="+", default=[128, 256, 512])
    add("--depths", type=int, nargs="+", default=[5, 10, 20, 30])
    add("--batch_pairs", type=int, default=16, help="pairs a batch in the other sweeps (default: 16)")
    add("--max_tokens", type=int, default=2048, help="tokens a micro-batch (default: 2048)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
