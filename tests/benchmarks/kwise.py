"""Training on whole rankings against training on pairs sampled from them, at equal tokens, with train_rm.py.

    python -m tests.benchmarks.kwise WORK_DIR --out docs/benchmarks/kwise.md

The data is the synthetic world of `rm.demo`, the model its SFT model: prompts with 4 to 6 replies of different quality.
One side trains on all replies of a prompt at once: the prompt is computed once, and every pair of replies is in the
loss. The other trains on pairs sampled from the same rankings, as many as have the same number of tokens: first one
pair of every prompt, then a second one, and so on. Both take the same number of optimizer steps. Each seed draws new
rankings, a new score head and a new order.

All are evaluated on rankings whose questions are worded differently from all training data, by the share of their pairs
in the right order. The data is synthetic: it can show that one method learns more from the same tokens here, but not
by how much on human data. WORK_DIR keeps finished runs, so that the command can be interrupted and repeated.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rm import demo
from rm.data.encode import common_prefix
from rm.data.tokenizer import Tokenizer
from tests.benchmarks.common import Page, table

ROOT = Path(__file__).parents[2]
ARMS = {  # name on the page -> (folder, training data, flags)
    "pairs sampled from the rankings": ("pairs", "pairs", ()),
    "rankings, Bradley-Terry of all pairs": ("kwise", "rankings", ()),
    "rankings, Plackett-Luce": ("luce", "rankings", ("--loss", "plackett_luce")),
}


def main() -> None:
    args = arguments()
    page = Page("Whole rankings against pairs sampled from them", args)
    model, test = train_sft_model(args), args.work / "test.jsonl"
    write(test, list(rankings(args.test_prompts, seed=10**6, test=True)))
    accuracies = {(arm, rate): [] for arm in ARMS for rate in args.learning_rates}
    for seed in range(args.seeds):
        folder = args.work / f"seed_{seed}"
        sizes = write_training_data(folder, Tokenizer(model), args, seed)
        for (arm, (name, data, flags)), rate in itertools.product(ARMS.items(), args.learning_rates):
            flags = (*flags, "--eval_dataset_path", test, "--num_train_epochs", args.epochs, "--seed", seed,
                     "--learning_rate", rate, "--global_batch_size", sizes[data]["batch"])  # fmt: skip
            out = folder / f"{name}_{rate:g}"
            train("train_rm.py", out, model, folder / f"{data}.jsonl", args, flags)
            accuracies[arm, rate].append(final_accuracy(out))
    page.add(description(args, sizes), results(args, accuracies))
    page.finish()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", metavar="WORK_DIR", type=Path)
    add("--prompts", type=int, default=320, help="rankings to train on (default: 320)")
    add("--test_prompts", type=int, default=300, help="rankings to evaluate on (default: 300)")
    add("--prompts_a_step", type=int, default=16)
    add("--epochs", type=int, default=2)
    add("--learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4])
    add("--seeds", type=int, default=4)
    add("--threads", type=int, default=1, help="torch threads (default: 1)")
    add("--out", help="also write the page to this file")
    return parser.parse_args()


# Data: rankings, and pairs as rankings of two replies


def rankings(count: int, seed: int, test: bool) -> Iterator[dict]:
    """Rankings about the facts of the demo world of seed 0, from a polite right answer to a rude, unrelated one.

    With `test` the questions have their held-out wording.
    """
    author = demo.Author(random.Random(0))
    author.rng = rng = random.Random(seed)
    for _ in range(count):
        fact = rng.choice(author.facts)
        near = [f for f in author.facts if f.relation == fact.relation and f.value != fact.value]
        far = [f for f in author.facts if f.relation != fact.relation and f.value != fact.value]
        form = rng.randrange(3)
        right, wrong, off_topic = (f.answers[form] for f in (fact, rng.choice(near), rng.choice(far)))
        polite, rude, as_rude = rng.choice(demo.POLITE), *rng.sample(demo.RUDE, 2)
        best_first = [polite.format(right), right, rude.format(right), wrong, off_topic, as_rude.format(off_topic)]
        kept = rng.sample(range(6), rng.randint(4, 6))
        before = author.dialogue(turns=rng.choice((0, 0, 0, 1)))
        prompt = before + demo.turn(fact.held_out if test else rng.choice(fact.questions), "")
        yield {"prompt": prompt, "responses": [best_first[i] for i in kept], "ranks": [i + 1 for i in kept]}


def sampled_pairs(ranked: list[dict], rng: random.Random) -> Iterator[dict]:
    """One pair of every ranking, then a second one of every ranking, ..., until there are no more."""
    every = [list(itertools.combinations(range(len(ranking["ranks"])), 2)) for ranking in ranked]
    for pairs in every:
        rng.shuffle(pairs)
    for turn in range(max(map(len, every))):
        for ranking, pairs in rng.sample(list(zip(ranked, every, strict=True)), len(ranked)):
            for both in pairs[turn : turn + 1]:
                yield ranking | {key: [ranking[key][i] for i in both] for key in ("responses", "ranks")}


def tokens_of(ranking: dict, tokenizer: Tokenizer) -> int:
    """The tokens that a step computes for a ranking: its prefix once, and its replies."""
    texts = tokenizer.encode_batch([ranking["prompt"] + reply for reply in ranking["responses"]])
    tokens = [np.array([*ids, tokenizer.eos_id]) for ids in texts]
    shared = common_prefix(tokens)
    return shared + sum(len(text) - shared for text in tokens)


def write_training_data(folder: Path, tokenizer: Tokenizer, args: argparse.Namespace, seed: int) -> dict[str, dict]:
    """Write rankings.jsonl, and pairs.jsonl with as many tokens; returns the sizes of each."""
    ranked = list(rankings(args.prompts, seed, test=False))
    budget = sum(tokens_of(ranking, tokenizer) for ranking in ranked)
    pairs = list(sampled_pairs(ranked, random.Random(seed)))
    cost = np.cumsum([tokens_of(pair, tokenizer) for pair in pairs])
    pairs = pairs[: int((cost <= budget).sum())]
    steps = -(-args.prompts // args.prompts_a_step)
    sizes = {}
    for name, records, tokens in (("rankings", ranked, budget), ("pairs", pairs, cost[len(pairs) - 1])):
        write(folder / f"{name}.jsonl", records)
        compared = sum(len(record["ranks"]) * (len(record["ranks"]) - 1) // 2 for record in records)
        batch = -(-len(records) // steps)
        sizes[name] = {"records": len(records), "compared": compared, "tokens": int(tokens), "batch": batch}
    return sizes


def write(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


# Runs


def train_sft_model(args: argparse.Namespace) -> Path:
    """Train the demo world's model by SFT, with the flags of launch/quickstart.sh; returns its folder."""
    world = args.work / "world"
    if not world.exists():
        demo.write_world(world, seed=0)
    flags = ("--learning_rate", 1e-3, "--num_train_epochs", 3, "--global_batch_size", 8)
    train("train_sft.py", args.work / "sft", world / "model", world / "sft.json", args, flags)
    return args.work / "sft" / "model"


def train(script: str, out: Path, model: Path, data: Path, args: argparse.Namespace, flags: tuple) -> None:
    """Run a training script, unless its model exists already."""
    if (out / "model").exists():
        return
    print(out, file=sys.stderr)
    command = [sys.executable, ROOT / script, "--output_dir", out, "--model_name_or_path", model]
    command += ["--dataset_path", data, "--cache_dir", args.work / "cache", *flags]
    command += ["--lr_scheduler_type", "cosine", "--warmup_ratio", 0.05]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)


def final_accuracy(out: Path) -> float:
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [line["eval_accuracy"] for line in lines if "eval_accuracy" in line][-1]


# The page


def description(args: argparse.Namespace, sizes: dict[str, dict]) -> str:
    rows = [[name, *(f"{size[key]:,}" for key in ("records", "compared", "tokens", "batch"))]
            for name, size in sizes.items()]  # fmt: skip
    head = ["", "records", "pairs compared", "tokens computed an epoch", "records a step"]
    runs = f"{args.seeds} seeds, {args.epochs} epochs, {args.test_prompts} held-out rankings."
    return f"{runs} The last seed's training data:\n\n{table(head, rows)}"


def results(args: argparse.Namespace, accuracies: dict) -> str:
    """Held-out accuracy of every arm and rate over the seeds, and the gain of rankings over pairs."""
    first, *others = ARMS
    best = {arm: max(args.learning_rates, key=lambda rate: statistics.mean(accuracies[arm, rate])) for arm in ARMS}
    rows = [[arm, *(spread(accuracies[arm, rate]) for rate in args.learning_rates)] for arm in ARMS]
    head = ["held-out accuracy", *(f"learning rate {rate:g}" for rate in args.learning_rates)]
    gains = []
    for arm in others:
        cells = []
        for rate, pairs_rate in [(rate, rate) for rate in args.learning_rates] + [(best[arm], best[first])]:
            gaps = [a - b for a, b in zip(accuracies[arm, rate], accuracies[first, pairs_rate], strict=True)]
            cells.append(f"{spread(gaps, '+')}, better in {sum(gap > 0 for gap in gaps)} of {len(gaps)}")
        gains.append([arm, *cells])
    gain_head = ["difference from the pairs, seed by seed", *head[1:], "each at its best rate"]
    return "\n".join(["Mean (standard deviation) over the seeds.\n", table(head, rows), table(gain_head, gains)])


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.3f} ({deviation:.3f})"


if __name__ == "__main__":
    main()
