"""Run every command in README.md and docs/ as documented, on small substitutes for the files that it names.

    python -m tests.cluster.documented [--only TEXT]

A temporary folder contains the repository's scripts and the files that the pages name (MODEL, pairs.jsonl.gz,
runs/rm/model, ...), made from the quickstart's synthetic data. Every command that `tests.docs_pages.commands` finds is
run there: `...` is replaced by the required flags, eight processes by two, and training stops after two steps.
Commands that need a cluster, a network or half an hour are listed and skipped, with the place where they are run
instead.
"""

import argparse
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.docs_pages import PAGES, ROOT, commands, without_remark

SKIPPED = {  # part of a command -> reason
    "launch/quickstart.sh": "takes minutes, and installs into .venv",
    "launch/hh_table.sh": "nine trainings; tests/test_launch.py",
    "tests/run.sh": "run by CI",
    "sbatch": "tests/cluster/slurm.py",
    "multi_node.sh": "tests/cluster/netns.py",
    "NAME": "a pattern, not a command",
    "tests.benchmarks": "each page names the command that made it",
    "tests.cluster": "these tests themselves",
}
TRAININGS = ("train_sft.py", "train_rm.py")
SHORT = "--max_steps 2 --global_batch_size 8 --max_tokens 2048 --eval_steps 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only commands that contain this text")
    only, failed = parser.parse_args().only, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for page in PAGES:
            for command in dict.fromkeys(commands(page.read_text())):
                if only not in command:
                    continue
                where = f"{page.relative_to(ROOT)}: {command}"
                reasons = [reason for text, reason in SKIPPED.items() if text in command]
                if reasons:
                    print(f"skipped ({reasons[0]})  {where}", flush=True)
                    continue
                began = time.perf_counter()
                done = run(runnable(command, folder), folder)
                result = "FAILED" if done.returncode else "ok"
                print(f"{result} {time.perf_counter() - began:.0f} s  {where}", flush=True)
                if done.returncode:
                    failed.append(where)
                    print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} commands failed")


def prepare(folder: Path) -> None:
    """Create the files that the commands name."""
    for path in ("rm", "launch", "tests", "docs", *TRAININGS, "eval_rm.py", "setup.py", "pyproject.toml", ".venv"):
        if (ROOT / path).exists():
            (folder / path).symlink_to(ROOT / path)
    require_success(run(f"python -m rm.demo {folder}/world", folder))
    world = folder / "world"
    (folder / "MODEL").symlink_to(world / "model")
    texts = json.loads((world / "sft.json").read_text())["instances"]
    pairs = [json.loads(line) for line in open(world / "rm_train.jsonl")]
    test = [json.loads(line) for line in open(world / "rm_test.jsonl")]
    for names, records in (
        (("sft.json", "demonstrations.jsonl"), texts[:200]),
        (("pairs.json", "train.json", "pairs.jsonl", "pairs.jsonl.gz", "more.parquet"), pairs[:200]),
        (("test.json", "test.jsonl.gz", "a.jsonl", "b.jsonl"), test[:40]),
        (("prompts.jsonl",), [{"prompt": "###Human: hi###Assistant:", "responses": [" yes", " no", " perhaps"]}] * 4),
        (("anthropic.jsonl",), [anthropic(n) for n in range(400)]),
    ):
        for name in names:
            write(folder / name, records)
    sft = f"--model_name_or_path MODEL --dataset_path sft.json --output_dir runs/llama-7b/sft {SHORT}"
    require_success(run(f"python train_sft.py {sft}", folder))
    shutil.copytree(folder / "runs/llama-7b/sft", folder / "runs/sft")
    rm = f"--model_name_or_path runs/sft/model --dataset_path pairs.json --use_lora true --output_dir runs/rm {SHORT}"
    require_success(run(f"python train_rm.py {rm}", folder))


def anthropic(number: int) -> dict:
    """A record in the format of Anthropic's files."""
    text = f"\n\nHuman: question {number}?\n\nAssistant:"
    return {"chosen": f"{text} good {number}", "rejected": f"{text} bad {number}"}


def write(file: Path, records: list[dict]) -> None:
    if file.suffix == ".parquet":
        return pq.write_table(pa.Table.from_pylist(records), file)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if file.suffix == ".json":
        lines = json.dumps({"type": "text_only", "instances": records})
    (gzip.open if file.suffix == ".gz" else open)(file, "wt").write(lines)


def runnable(command: str, folder: Path) -> str:
    """A documented command with its placeholders filled in."""
    command = without_remark(command).replace("--nproc_per_node 8", "--nproc_per_node 2")
    words = shlex.split(command)
    script = next((word for word in words if word.endswith(".py") or word.startswith("rm.")), "")
    words = ["anthropic.jsonl" if word.startswith("hub:") else word for word in words]
    if script == "rm.prepare_hh":  # the substitute has only 400 records
        words = [{"10000": "100", "112000": "100"}.get(word, word) for word in words]
        words += [] if "--sft" in words else ["--sft", "100", "--rm", "100"]
    fresh = f"runs/{len(list((folder / 'runs').iterdir()))}"
    if "..." in words:
        at = words.index("...")
        given = {"--model_name_or_path": "runs/sft/model", "--dataset_path": "pairs.jsonl.gz", "--output_dir": fresh}
        if script == "rm.audit" or script == "rm.prepare_hh":
            given = {"pairs.jsonl.gz": ""} if script == "rm.audit" else {"anthropic.jsonl": "", "--output_dir": fresh}
        words[at : at + 1] = [
            word for name, value in given.items() if name not in words for word in (name, value) if word
        ]
    elif "--output_dir" in words and (folder / words[words.index("--output_dir") + 1]).exists():
        words[words.index("--output_dir") + 1] = fresh
    if "--config" in words and script in TRAININGS:  # the settings of the recipe with the files made here
        if script == "train_sft.py":
            data, eval_data = "sft.json", "demonstrations.jsonl"
        else:
            data, eval_data = "pairs.json", "test.jsonl.gz"
        words += ["--model_name_or_path", "runs/sft/model", "--dataset_path", data]
        words += ["--eval_dataset_path", eval_data, "--output_dir", fresh]
    if script in TRAININGS:
        words += SHORT.split()
    if "launch/hh_rlhf.sh" in words:
        words[words.index("launch/hh_rlhf.sh")] = str(
            ROOT / "launch/hh_rlhf.sh"
        )  # it creates .venv in its own repository
        words += ["--nproc", "2", "--out", fresh, "--", *SHORT.split()]
    return shlex.join(words)


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": folders, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def require_success(done: subprocess.CompletedProcess) -> None:
    """Exit with the output of a command if it failed."""
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
