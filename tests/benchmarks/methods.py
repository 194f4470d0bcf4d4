"""What our own reward-model step needs and costs in several ways, on the same batches.

    python -m tests.benchmarks.methods --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/methods.md
    ... --compare recomputation     what is kept for the backward, and compiled layers

Methods: all weights; adapters of rank 16, 32 and 128 on all linear layers; LISA with two layers at a time, with and
without embeddings. Each is `train_rm.py` in a process of its own; they take turns, step by step, on the same pairs.
Adapters get ten times the learning rate, as they do in practice. So few steps measure what a step costs, not which
method learns best.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

from rm.data.encode import Task
from tests.benchmarks import training
from tests.benchmarks.common import MIB, Page, flags, table
from tests.benchmarks.turns import Contender, interleave

ADAPTERS = "--use_lora true --lora_dropout 0 --lora_target_modules all-linear --learning_rate 1e-4"
WAYS = {
    "methods": {
        "all weights": "",
        **{f"LoRA {r}": f"{ADAPTERS} --lora_r {r} --lora_alpha {2 * r}" for r in (16, 32, 128)},
        "LISA 2/20": "--use_lisa true",
        "LISA 2/20, embeddings frozen": "--use_lisa true --lisa_train_embeddings false",
    },
    "recomputation": {
        "nothing recomputed": "",
        **{f"{how} recomputation": f"--gradient_checkpointing {how}" for how in ("selective", "full")},
        "layers compiled": "--torch_compile true",
    },
}
TITLES = {"methods": "Full fine-tuning, LoRA and LISA", "recomputation": "Recomputation and compiled layers"}


def main() -> None:
    args = arguments()
    page = Page(f"{TITLES[args.compare]}, {'bf16' if args.bf16 else 'fp32'}", args)
    folder = Path(tempfile.mkdtemp())
    try:
        model, turns = training.first_layers(args.model, args.layers, folder / "layers"), args.warmup + args.steps + 2
        file, _ = training.choose(args, model, args.batch_pairs, turns - 2, Task.PREFERENCE, folder)
        contenders = []
        for number, (name, words) in enumerate(WAYS[args.compare].items()):
            shared = training.our_flags(args, model, file, args.batch_pairs, turns, folder / f"run{number}")
            contenders.append(Contender(name, args.threads, training.ours, "train_rm", shared + words.split()))
        interleave(contenders, args.warmup + args.steps)
    finally:
        shutil.rmtree(folder)
    page.add(
        f"{args.batch_pairs} pairs a step, pairs over {args.max_length} tokens left out, micro-batches of at most "
        f"{args.max_tokens} tokens. {len(contenders)} processes take turns; {args.warmup} warm-up, {args.steps} timed "
        "steps. Loss: mean of the last half of the steps, the same batches for all. Speed is relative to the first, "
        "by the median over steps of the ratio of wall seconds.\n",
        report(contenders, args.warmup),
    )
    page.finish()


def report(contenders: list[Contender], warmup: int) -> str:
    rows, full = [], contenders[0].of("wall", warmup)
    for c in contenders:
        wall, tokens, losses = (c.of(name, warmup) for name in ("wall", "tokens", "loss"))
        speed = statistics.median(a / b for a, b in zip(full, wall, strict=True))
        cells = (c.peak, c.peak + c.loaded, c.allocated)
        rows.append([c.name, f"{c.turns[-1]['trained']:,}", f"{c.turns[-1]['states'] / MIB:,.0f}",
                     *(f"{x / MIB:,.0f}" for x in cells), f"{sum(tokens) / sum(wall):,.0f}", f"{speed:.2f}",
                     f"{statistics.mean(losses[len(losses) // 2 :]):.4f}"])  # fmt: skip
    head = ["", "parameters trained in a step", "optimizer state, MiB", "peak RSS above loaded, MiB",
            "peak RSS in all, MiB", "allocator's peak in a turn, MiB", "tokens/s", "speed", "loss"]  # fmt: skip
    return table(head, rows)


def arguments():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--compare", choices=WAYS, default="methods", help="which table (default: methods)")
    add("--batch_pairs", type=int, default=8, help="pairs a step (default: 8)")
    add("--max_tokens", type=int, default=4096, help="tokens a micro-batch (default: 4096)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
