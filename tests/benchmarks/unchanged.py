"""Whether a change leaves the numbers alone: every kind of run on real input, recorded and compared bit for bit.

    python -m tests.benchmarks.unchanged record OUT --model DIR --data FILE [--repo CHECKOUT]
    python -m tests.benchmarks.unchanged compare BEFORE AFTER

`record` runs SFT and reward modelling in full, with LoRA and with LISA, on pairs and on rankings, in one process and in
two, and eval_rm.py on what comes out, with the code of CHECKOUT (default: this one). `compare` holds the metrics, the
weights and the scores of two recordings against each other. Both recordings have to be made on one machine.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAIRS, STEPS = 120, 8
COMMON = ["--global_batch_size", "12", "--max_steps", str(STEPS), "--logging_steps", "1", "--eval_steps", "4",
          "--max_length", "384", "--overlong", "truncate", "--max_tokens", "1600", "--learning_rate", "1e-3",
          "--validation_split_percentage", "20", "--save_steps", "3", "--lr_scheduler_type", "cosine"]  # fmt: skip
LORA = ["--use_lora", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--loraplus_lr_ratio", "4"]
LISA = ["--use_lisa", "true", "--lisa_activated_layers", "1", "--lisa_interval_steps", "2"]
RUNS = {  # name -> (script, data, flags)
    "sft_full": ("train_sft.py", "sft.jsonl", []),
    "sft_lora": ("train_sft.py", "sft.jsonl", LORA),
    "sft_lisa": ("train_sft.py", "sft.jsonl", LISA),
    "rm_full": ("train_rm.py", "pairs.jsonl", []),
    "rm_lora": ("train_rm.py", "pairs.jsonl", LORA),
    "rm_kwise": ("train_rm.py", "rankings.jsonl", ["--label_smoothing", "0.1", "--center_rewards_coefficient", "0.01"]),
    "rm_bfloat16": ("train_rm.py", "pairs.jsonl", ["--dtype", "bfloat16", "--gradient_checkpointing", "selective"]),
    "rm_anthropic": ("train_rm.py", "pairs.jsonl", ["--dialogue_format", "anthropic", "--loss", "plackett_luce"]),
}  # fmt: skip
NOT_COMPARED = ("second", "memory")  # of a line of metrics: what clock and memory have to do with


def write_data(source: Path, folder: Path) -> None:
    """pairs.jsonl, sft.jsonl (the chosen texts) and rankings.jsonl (three replies, two of them equally good)."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line, _ in zip(file, range(PAIRS), strict=False)]
    rankings = []
    for pair in pairs:
        prompt, _, chosen = pair["chosen"].rpartition("\n\nAssistant:")
        rejected = pair["rejected"].rpartition("\n\nAssistant:")[2]
        replies = [chosen, rejected, rejected[: len(rejected) // 2]]
        rankings.append({"prompt": f"{prompt}\n\nAssistant:", "responses": replies, "scores": [2, 1, 1]})
    texts = [{"text": pair["chosen"]} for pair in pairs]
    for name, records in (("pairs", pairs), ("sft", texts), ("rankings", rankings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run(repo: Path, processes: int, *words: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *(torchrun if processes > 1 else []), *words]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def record(args: argparse.Namespace) -> None:
    out, model = args.out.resolve(), str(args.model.resolve())
    out.mkdir(parents=True)
    write_data(args.data, out)
    for processes in (1, 2):
        for name, (script, data, flags) in RUNS.items():
            folder, cache = out / f"{name}_{processes}", ["--cache_dir", str(out / "cache")]
            given = ["--model_name_or_path", model, "--dataset_path", str(out / data), "--output_dir", str(folder)]
            run(args.repo, processes, script, *given, *COMMON, *flags, *cache)
            if script == "train_rm.py":
                scored = ["--model_name_or_path", str(folder / "model"), "--dataset_path", str(out / data)]
                run(args.repo, processes, "eval_rm.py", *scored, "--output_dir", str(folder / "eval"), *cache)
            print(folder.name, flush=True)
    shutil.rmtree(out / "cache")


def compare(args: argparse.Namespace) -> None:
    folders = [folder.name for folder in sorted(args.before.iterdir()) if folder.is_dir()]
    print("| run | lines of metrics | tensors | scores |\n| --- | --- | --- | --- |")
    for name in folders:
        before, after = (metrics(folder / name) for folder in (args.before, args.after))
        assert before == after, f"{name}: metrics\n{before}\n{after}"
        tensors = same_tensors(args.before / name, args.after / name)
        scores = same_evaluation(args.before / name / "eval", args.after / name / "eval")
        print(f"| {name} | {len(before)} | {tensors} | {scores or '-'} |")
    print("\nbit-identical")


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [{k: v for k, v in line.items() if not any(word in k for word in NOT_COMPARED)} for line in lines]


def same_tensors(before: Path, after: Path) -> int:
    """How many tensors the exported weights and adapters hold, all of them equal."""
    count, files = 0, sorted(file.relative_to(before) for file in before.glob("*/*.safetensors"))
    assert files, before
    for file in files:
        one, other = load_file(before / file), load_file(after / file)
        assert one.keys() == other.keys(), file
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), f"{file}: {name}"
        count += len(one)
    return count


def same_evaluation(before: Path, after: Path) -> int:
    """How many records were scored, all of them alike; the reports agree in every number."""
    if not before.is_dir():
        return 0
    one, other = ((folder / "scores.jsonl").read_text().splitlines() for folder in (before, after))
    assert one == other, before
    reports = [json.loads((folder / "report.json").read_text()) for folder in (before, after)]
    for name in reports[0]["sets"]:
        assert reports[0]["sets"][name] == reports[1]["sets"][name], f"{before}: {name}"
    return len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="run everything and keep what comes out in OUT")
    recorder.add_argument("out", metavar="OUT", type=Path)
    recorder.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a small model")
    recorder.add_argument("--data", type=Path, required=True, help="gzipped preference pairs as Anthropic writes them")
    recorder.add_argument("--repo", type=Path, default=ROOT, help="the checkout whose scripts run (default: this one)")
    recorder.set_defaults(do=record)
    comparer = commands.add_parser("compare", help="hold two recordings against each other")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.set_defaults(do=compare)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
