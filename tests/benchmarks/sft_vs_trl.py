"""Our fine-tuning step against TRL's SFTTrainer, on the chosen sides of pairs: same weights, token ids, batches, order.

    python -m tests.benchmarks.sft_vs_trl --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/sft_vs_trl.md

TRL runs with its defaults: gradient checkpointing, batches padded to their longest text, no packing, the
cross entropy in chunks without full logits. Only its default bf16=True is replaced by False, unless `--bf16` is given;
`--no-gradient_checkpointing` switches off recomputation. Loss is on every token. Neither side truncates a text, since
longer ones are left out.
"""

import shutil
import tempfile
from argparse import BooleanOptionalAction
from pathlib import Path

from rm.data.encode import Task
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, side_by_side, versus
from tests.benchmarks.turns import Contender, interleave


def main() -> None:
    args = arguments()
    page = Page("Fine-tuning: ours against TRL SFTTrainer", args)
    folder = Path(tempfile.mkdtemp())
    try:
        model, turns = training.first_layers(args.model, args.layers, folder / "layers"), args.warmup + args.steps + 2
        file, examples = training.choose(args, model, args.batch_texts, turns - 2, Task.SFT, folder)
        records = [{"input_ids": e.replies[0].tolist()} for e in examples]
        our_words = training.our_flags(args, model, file, args.batch_texts, turns, folder / "ours")
        trl_words = training.trl_settings(args, folder / "trl", turns, args.batch_texts)
        ours = Contender("ours", args.threads, training.ours, "train_sft", our_words)
        trl = Contender("TRL SFTTrainer", args.threads, training.trl, "SFT", model, trl_words, records)
        interleave([ours, trl], args.warmup + args.steps, tolerance=0.05 if args.bf16 else 1e-3)
    finally:
        shutil.rmtree(folder)
    page.add(
        f"Full fine-tuning, {'bf16' if args.bf16 else 'fp32'}; {args.batch_texts} texts a step, random batches, texts "
        f"over {args.max_length} tokens left out, loss on every token; ours with micro-batches of at most "
        f"{args.max_tokens} tokens{' and ' + args.ours if args.ours else ''}; TRL with bf16={args.bf16}, "
        f"gradient_checkpointing={args.gradient_checkpointing} and otherwise its defaults. Strictly alternating steps "
        f"in two processes, {args.warmup} warm-up.\n",
        versus(ours, trl, args.warmup, args.batch_texts, "texts"),
        side_by_side(ours, trl, args.warmup),
    )
    page.finish()


def arguments():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--batch_texts", type=int, default=8, help="texts a step (default: 8)")
    add("--max_tokens", type=int, default=4096, help="ours: tokens a micro-batch (default: 4096)")
    add("--learning_rate", type=float, default=1e-5)
    add("--gradient_checkpointing", action=BooleanOptionalAction, default=True, help="TRL recomputes activations")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
