"""Our reward-model training step against TRL's RewardTrainer: same weights, token ids, batches, order and optimizer.

    python -m tests.benchmarks.rm_vs_trl --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/rm_vs_trl.md
    ... --gradient_checkpointing     TRL as it comes (it recomputes activations by default)
    ... --group_by_length            batches of similar lengths, from transformers' own sampler, for both sides
    ... --bf16                       TRL under autocast, ours with --dtype bfloat16; fp32 weights on both sides
    ... --lora 16                    TRL with PEFT on the seven linears, ours with --use_lora

Both start from one exported folder, so that the score head is the same too.
"""

import shutil
import tempfile
from argparse import BooleanOptionalAction
from pathlib import Path

from rm.data.encode import Task
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, side_by_side, versus
from tests.benchmarks.turns import Contender, in_child, interleave


def main() -> None:
    args = arguments()
    page = Page("Reward model: ours against TRL RewardTrainer", args)
    folder = Path(tempfile.mkdtemp())
    try:
        base = training.first_layers(args.model, args.layers, folder / "layers")
        model, turns = (
            str(folder / "model"),
            args.warmup + args.steps + 2,
        )  # one profiled, one that is loaded ahead and never taken
        in_child(training.export_reward_model, base, model, args.seed)
        file, examples = training.choose(args, model, args.batch_pairs, turns - 2, Task.PREFERENCE, folder)
        records = [
            {"chosen_ids": [*e.prefix.tolist(), *e.replies[0].tolist()],
             "rejected_ids": [*e.prefix.tolist(), *e.replies[1].tolist()]}
            for e in examples
        ]  # fmt: skip
        our_words = training.our_flags(args, model, file, args.batch_pairs, turns, folder / "ours") + args.lora_flags
        trl_words = training.trl_settings(args, folder / "trl", turns, args.batch_pairs)
        ours = Contender("ours", args.threads, training.ours, "train_rm", our_words)
        trl = Contender("TRL RewardTrainer", args.threads, training.trl, "Reward", model, trl_words, records, args.lora)
        interleave([ours, trl], args.warmup + args.steps, tolerance=0.05 if args.bf16 else 1e-3)
    finally:
        shutil.rmtree(folder)
    kind = f"LoRA r={args.lora}" if args.lora else "Full fine-tuning"
    page.add(
        f"{kind}, {'bf16' if args.bf16 else 'fp32'}; {args.batch_pairs} pairs a step, "
        f"{'grouped by length' if args.group_by_length else 'random batches'}, pairs over {args.max_length} tokens "
        f"left out; ours with micro-batches of at most {args.max_tokens} tokens"
        f"{' and ' + args.ours if args.ours else ''}; TRL with "
        f"gradient_checkpointing={args.gradient_checkpointing}. Trained parameters: "
        f"ours {ours.turns[0]['trained']:,}, TRL {trl.turns[0]['trained']:,}. Strictly alternating steps in "
        f"two processes, {args.warmup} warm-up.\n",
        versus(ours, trl, args.warmup, args.batch_pairs, "pairs"),
        side_by_side(ours, trl, args.warmup),
    )
    page.finish()


def arguments():
    parser = flags(__doc__)
    add = parser.add_argument
    add("--batch_pairs", type=int, default=8, help="pairs a step (default: 8)")
    add("--max_tokens", type=int, default=4096, help="ours: tokens a micro-batch (default: 4096)")
    add("--learning_rate", type=float, default=1e-5)
    add("--gradient_checkpointing", action=BooleanOptionalAction, default=False, help="TRL recomputes activations")
    add("--group_by_length", action="store_true", help="batches of similar lengths, for both sides")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--lora", type=int, metavar="R", help="adapters of this rank instead of full fine-tuning")
    args = parser.parse_args()
    args.lora_flags = []
    if args.lora:
        adapters = f"--use_lora true --lora_r {args.lora} --lora_alpha {2 * args.lora} --lora_dropout 0"
        args.lora_flags = f"{adapters} --lora_target_modules all-linear".split()
    return args


if __name__ == "__main__":
    main()
