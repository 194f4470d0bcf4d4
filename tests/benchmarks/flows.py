"""The same scores in every library that reads the model: SFT, a reward model by LoRA, merged, exported.

    python -m tests.benchmarks.flows --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/flows.md

The scripts are run as a user runs them, for a few steps each: this tests the export, not the quality of the reward
model. Then the same texts are scored by every library that can read the files, each text alone and in fp32.
"""

import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from rm.data.records import read_records
from rm.scoring.scorer import Scorer
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, table

ROOT = Path(__file__).parents[2]


def main() -> None:
    args = arguments()
    page = Page("The same scores in every library that reads the model", args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = make(args, training.first_layers(args.model, args.layers, folder / "layers"), folder)
        texts = [line["positive"] for line in map(json.loads, open(folder / "held_out.jsonl"))][: args.texts]
        # Each model is freed before the next one is loaded.
        scores = {reader: torch.tensor(score(texts)).double() for reader, score in readers(folder).items()}
    first, expected = next(iter(scores.items()))
    differences = {reader: (values - expected).abs().max().item() for reader, values in scores.items()}
    rows = [[reader, f"{difference:.1e}"] for reader, difference in differences.items()]
    page.add(
        f"{args.steps} steps of {args.pairs} examples each, fp32, {args.threads} threads.\n",
        table(["command", "seconds"], commands),
        f"{len(texts)} held-out texts of {min(map(len, texts))} to {max(map(len, texts)):,} characters; rewards from "
        f"{expected.min():.3f} to {expected.max():.3f}, standard deviation {expected.std():.3f}. Largest difference "
        f"from the first one:\n",
        table(["reader", "largest difference"], rows),
    )
    page.finish()
    if max(differences.values()) > 1e-4:
        raise SystemExit(f"the scores differ by up to {max(differences.values()):.1e} from those of {first}")


def make(args: Namespace, model: str, folder: Path) -> list[list]:
    """Train and export into `folder`; [command, seconds] of each."""
    records = itertools.islice((record for path in args.data for _, record in read_records(path)), args.records)
    texts = [(record["chosen"], record["rejected"]) for record in records]
    train, held_out = texts[: 2 * args.steps * args.pairs], texts[-2 * args.texts :]
    write(folder / "sft.jsonl", [{"text": chosen} for chosen, _ in train])
    write(folder / "pairs.jsonl", [{"positive": chosen, "negative": rejected} for chosen, rejected in train])
    # eval_rm.py would leave out the others.
    short = [pair for pair in held_out if max(map(len, pair)) < 1500 and pair[0] != pair[1]]
    write(folder / "held_out.jsonl", [{"positive": chosen, "negative": rejected} for chosen, rejected in short])
    common = f"--global_batch_size {args.pairs} --max_steps {args.steps} --max_tokens 2048 --dtype float32"
    commands = [
        f"train_sft.py --model_name_or_path {model} --dataset_path sft.jsonl --output_dir sft {common} "
        "--learning_rate 3e-5",
        f"train_rm.py --model_name_or_path sft/model --dataset_path pairs.jsonl --output_dir rm {common} "
        "--learning_rate 1e-3 --use_lora true --lora_target_modules all-linear",
        "-m rm.export --model_name_or_path rm/adapter --output_dir exported --dtype float32 --max_shard_gb 0.2",
        "eval_rm.py --model_name_or_path exported --dataset_path held_out.jsonl --output_dir evaluated",
    ]
    rows = []
    for command in commands:
        began = time.perf_counter()
        words = [str(ROOT / word) if word.endswith(".py") else word for word in command.split()]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads), "PATH": ""}
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, stdout=sys.stderr)
        shown = command.replace(model, Path(args.model).name)
        rows.append([f"`python {shown}`", f"{time.perf_counter() - began:.0f}"])
    return rows


def write(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def readers(folder: Path) -> dict[str, Callable[[list[str]], list[float]]]:
    """Name of a library -> function that scores texts with it."""
    exported = str(folder / "exported")
    return {
        "`Scorer`, the adapter on its base": lambda texts: ours(folder / "rm/adapter", texts),
        "`Scorer`, merged at the end of training": lambda texts: ours(folder / "rm/model", texts),
        "`Scorer`, exported": lambda texts: ours(exported, texts),
        "`eval_rm.py`, exported": lambda texts: evaluated(folder / "evaluated", len(texts)),
        "transformers `AutoModelForSequenceClassification`, exported": lambda texts: transformers_scores(
            exported, texts
        ),
        "the same, all texts in one padded batch": lambda texts: padded(exported, texts),
        "transformers `pipeline`, exported": lambda texts: pipeline(exported, texts),
        "transformers token classification, last token (verl's way)": lambda texts: by_token(exported, texts),
        "peft, the adapter on the SFT model": lambda texts: peft_scores(
            folder / "sft/model", folder / "rm/adapter", texts
        ),
        "TRL's `get_reward` (PPO)": lambda texts: trl_scores(exported, texts),
    }


def ours(path: str | Path, texts: list[str]) -> list[float]:
    return Scorer(path, dtype="float32").score(texts)


def evaluated(folder: Path, count: int) -> list[float]:
    """The scores that eval_rm.py wrote, of the first records' better replies."""
    file = next(folder.glob("scores.jsonl*"))
    lines = (gzip.open if file.suffix == ".gz" else open)(file, "rt")
    scores = (json.loads(line)["scores"] for line in lines)
    return [of_record[0] for of_record in itertools.islice(filter(None, scores), count)]


@torch.no_grad()
def alone(model: torch.nn.Module, tokenizer, texts: list[str]) -> list[float]:
    """Score each text by itself, with EOS appended, which the tokenizers do not do."""
    batches = (tokenizer(text + tokenizer.eos_token, return_tensors="pt") for text in texts)
    return [model(**batch).logits[0].flatten()[-1].item() for batch in batches]


def read(folder: str, kind: str):
    import transformers

    warnings.simplefilter("ignore")  # a token classifier has a bias that the file lacks
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def transformers_scores(folder: str, texts: list[str]) -> list[float]:
    return alone(*read(folder, "SequenceClassification"), texts)


@torch.no_grad()
def padded(folder: str, texts: list[str]) -> list[float]:
    model, tokenizer = read(folder, "SequenceClassification")
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    return model(**batch).logits[:, 0].tolist()


def pipeline(folder: str, texts: list[str]) -> list[float]:
    import transformers

    classify = transformers.pipeline("text-classification", model=folder, dtype=torch.float32)
    return [line["score"] for line in classify([text + classify.tokenizer.eos_token for text in texts])]


def by_token(folder: str, texts: list[str]) -> list[float]:
    return alone(*read(folder, "TokenClassification"), texts)


def peft_scores(base: Path, adapter: Path, texts: list[str]) -> list[float]:
    from peft import PeftModel
    from transformers import AutoTokenizer

    model, _ = read(str(base), "SequenceClassification")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model.config.pad_token_id = tokenizer.pad_token_id  # a language model's may be its EOS, which ends the texts here
    return alone(PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer, texts)


@torch.no_grad()
def trl_scores(folder: str, texts: list[str]) -> list[float]:
    from trl.experimental.utils import get_reward

    model, tokenizer = read(folder, "SequenceClassification")
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"] for text in texts]
    return [get_reward(model, x, model.config.pad_token_id, 1)[1].item() for x in ids]


def arguments() -> Namespace:
    parser = flags(__doc__, steps=4)
    parser.add_argument("--pairs", type=int, default=8, help="examples a step (default: 8)")
    parser.add_argument("--texts", type=int, default=16, help="held-out texts that are scored (default: 16)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
