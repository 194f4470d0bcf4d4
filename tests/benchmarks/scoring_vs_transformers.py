"""Scoring pairs: ours against transformers' sequence classification, batches of texts sorted by length and padded.

    python -m tests.benchmarks.scoring_vs_transformers --model MODEL --data pairs.jsonl.gz --pairs 128 --steps 3 \
        --out docs/benchmarks/scoring_vs_transformers.md

A turn is one pass over all pairs, without gradients. Both sides start from the same folder and the same token ids.
"""

import shlex
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import eval_rm
from rm.config import parse
from rm.data import dataset
from rm.data.batch import EvalBatches
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.hf import build
from rm.model.heads import RewardModel
from rm.scoring.score import all_rewards
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, versus
from tests.benchmarks.turns import Contender, Turns, in_child, interleave


def main() -> None:
    args = arguments()
    page = Page("Scoring pairs: ours against transformers", args)
    folder = Path(tempfile.mkdtemp())
    try:
        base, model = training.first_layers(args.model, args.layers, folder / "layers"), str(folder / "model")
        in_child(training.export_reward_model, base, model, args.seed)
        file, _ = training.choose(args, model, args.pairs, 1, Task.PREFERENCE, folder, again=0)
        ours = Contender("ours", args.threads, our_scores, args, model, file)
        theirs = Contender("transformers", args.threads, their_scores, args, model, file)
        interleave([ours, theirs], args.warmup + args.steps)
    finally:
        shutil.rmtree(folder)
    a, b = (np.array(contender.turns[0]["scores"]) for contender in (ours, theirs))  # (pairs, 2)
    computed = ours.turns[0]["tokens"], theirs.turns[0]["tokens"]
    agree = ((a[:, 0] > a[:, 1]) == (b[:, 0] > b[:, 1])).mean()
    page.add(
        f"{args.pairs} random pairs, {'bf16' if args.bf16 else 'fp32'}, pairs over {args.max_length} tokens left out, "
        f"ours in micro-batches of at most {args.max_tokens} tokens, transformers in batches of {args.batch_texts} "
        f"texts sorted by length. Strictly alternating passes in two processes; {args.warmup} warm-up.\n",
        versus(ours, theirs, args.warmup, args.pairs, "pairs"),
        f"Tokens computed: ours {computed[0]:,}, theirs {computed[1]:,} with padding, "
        f"{computed[1] / computed[0]:.2f} times as many.\n"
        f"Scores: largest difference {abs(a - b).max():.1e} (their standard deviation is {b.std():.2f}); "
        f"the same reply wins in {agree:.1%} of the pairs.\n",
    )
    page.finish()


def our_scores(turns: Turns, args: Namespace, model: str, file: str) -> None:
    lengths = f"--max_length {args.max_length} --max_tokens {args.max_tokens}"
    dtype = "bfloat16" if args.bf16 else "float32"
    words = ["--model_name_or_path", model, "--dataset_path", file, "--output_dir", "none", "--dtype", dtype]
    settings = parse(eval_rm.Settings, "", [*words, *shlex.split(f"{lengths} {args.ours}")])
    with dist.session(args.seed):
        examples, _ = dataset.read(Task.PREFERENCE, [file], Tokenizer(model), args.max_length)
        loaded = build.load(build.build(RewardModel, model, settings.parallel), model)
        while True:
            turns.begin()
            scores = all_rewards(loaded, EvalBatches(examples, settings.packing))
            turns.end(scores=scores.view(-1, 2).tolist(), tokens=int(examples.lengths.sum()))


def their_scores(turns: Turns, args: Namespace, model: str, file: str) -> None:
    from transformers import AutoModelForSequenceClassification

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype).eval()
    for parameter in loaded.parameters():  # a file mapped into memory is not anonymous memory
        parameter.data = parameter.data.clone()
    examples, _ = dataset.read(Task.PREFERENCE, [file], Tokenizer(model), args.max_length)
    texts = [torch.from_numpy(np.concatenate([e.prefix, reply])) for e in examples for reply in e.replies]
    pad = torch.nn.utils.rnn.pad_sequence
    while True:
        turns.begin()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores, tokens = torch.empty(len(texts)), 0
        for start in range(0, len(texts), args.batch_texts):
            indices = order[start : start + args.batch_texts]
            ids = pad([texts[i].long() for i in indices], True, loaded.config.pad_token_id)
            mask = pad([torch.ones(len(texts[i]), dtype=torch.long) for i in indices], True, 0)
            with torch.no_grad():
                logits = loaded(input_ids=ids, attention_mask=mask, use_cache=False).logits
            scores[indices] = logits[:, 0].float()
            tokens += ids.numel()
        turns.end(scores=scores.view(-1, 2).tolist(), tokens=tokens)


def arguments() -> Namespace:
    parser = flags(__doc__, steps=3)
    add = parser.add_argument
    add("--pairs", type=int, default=128, help="pairs scored in a turn (default: 128)")
    add("--max_tokens", type=int, default=4096, help="ours: tokens a micro-batch (default: 4096)")
    add("--batch_texts", type=int, default=16, help="transformers: texts a batch (default: 16)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
