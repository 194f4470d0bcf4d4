"""Run every command of the README and of docs/, as it stands there, on stand-ins for what it names.

    python -m tests.cluster.documented [--only TEXT]

In a folder of its own lie the files that the pages speak of (MODEL, pairs.jsonl.gz, runs/rm/model, ...), made of the
quickstart's synthetic world, and the repository's scripts. Every command of `tests.test_docs.commands` is run there:
`...` becomes the required flags, eight processes become two, a training stops after two steps. What needs a cluster,
a network or half an hour is named and left out; where it is run instead is said beside it.
"""

import argparse
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.test_docs import PAGES, ROOT, commands

LEFT_OUT = {
    "launch/quickstart.sh": "the first thing that CI's users run",
    "tests/run.sh": "run by CI",
    "sbatch": "tests/cluster/slurm.py",
    "multi_node.sh": "tests/cluster/netns.py",
    "NAME": "a pattern, not a command",
    "tests.benchmarks": "each has made its page",
    "tests.cluster": "themselves",
}
TRAININGS = ("train_sft.py", "train_rm.py")
SHORT = "--max_steps 2 --global_batch_size 8 --max_tokens 2048 --eval_steps 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only commands with this in them")
    only, failed = parser.parse_args().only, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for page in PAGES:
            for command in dict.fromkeys(commands(page.read_text())):
                if only not in command:
                    continue
                where = f"{page.relative_to(ROOT)}: {command}"
                if reason := next((why for word, why in LEFT_OUT.items() if word in command), None):
                    print(f"left out ({reason})  {where}", flush=True)
                    continue
                began, done = time.perf_counter(), run(runnable(command, folder), folder)
                print(
                    f"{'ok' if done.returncode == 0 else 'FAILED'} {time.perf_counter() - began:.0f} s  {where}",
                    flush=True,
                )
                if done.returncode:
                    failed.append(where)
                    print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} commands failed")


def prepare(folder: Path) -> None:
    """The files that the pages' commands name."""
    for path in ("rm", "launch", "tests", "docs", *TRAININGS, "eval_rm.py", "setup.py", "pyproject.toml", ".venv"):
        if (ROOT / path).exists():
            (folder / path).symlink_to(ROOT / path)
    must(run(f"python -m rm.demo {folder}/world", folder))
    world = folder / "world"
    (folder / "MODEL").symlink_to(world / "model")
    texts, pairs, test = (
        [json.loads(line) for line in open(world / f"{name}.jsonl")] if (world / f"{name}.jsonl").exists()
        else json.loads((world / f"{name}.json").read_text())["instances"]
        for name in ("sft", "rm_train", "rm_test")
    )  # fmt: skip
    for names, records in (
        (("sft.json", "demonstrations.jsonl"), texts[:200]),
        (("pairs.json", "train.json", "pairs.jsonl", "pairs.jsonl.gz", "more.parquet"), pairs[:200]),
        (("test.json", "test.jsonl.gz", "a.jsonl", "b.jsonl"), test[:40]),
        (("prompts.jsonl",), [{"prompt": "###Human: hi###Assistant:", "responses": [" yes", " no", " perhaps"]}] * 4),
        (("anthropic.jsonl",), [anthropic(n) for n in range(400)]),
    ):
        for name in names:
            write(folder / name, records)
    common = f"{SHORT} --output_dir"
    must(
        run(
            f"python train_sft.py --model_name_or_path MODEL --dataset_path sft.json {common} runs/llama-7b/sft", folder
        )
    )
    shutil.copytree(folder / "runs/llama-7b/sft", folder / "runs/sft")
    words = f"--model_name_or_path runs/sft/model --dataset_path pairs.json --use_lora true {common} runs/rm"
    must(run(f"python train_rm.py {words}", folder))


def anthropic(number: int) -> dict:
    """A conversation as Anthropic's files have it."""
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
    """A page's command with what it leaves open filled in."""
    command = re.split(r"  +(?=[a-z#])", command)[0].replace("--nproc_per_node 8", "--nproc_per_node 2")
    words = shlex.split(command)
    script = next((word for word in words if word.endswith(".py") or word.startswith("rm.")), "")
    words = ["anthropic.jsonl" if word.startswith("hub:") else word for word in words]
    if script == "rm.prepare_hh":  # of a stand-in that is small
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
    if "--config" in words and script in TRAININGS:  # a recipe: its settings, our files
        data = "sft.json" if script == "train_sft.py" else "pairs.json"
        words += [
            "--model_name_or_path",
            "runs/sft/model",
            "--dataset_path",
            data,
            "--eval_dataset_path",
            "test.jsonl.gz",
        ]
        words[-1] = "demonstrations.jsonl" if script == "train_sft.py" else words[-1]
        words += ["--output_dir", fresh]
    if script in TRAININGS:
        words += SHORT.split()
    if "launch/hh_rlhf.sh" in words:
        words[words.index("launch/hh_rlhf.sh")] = str(ROOT / "launch/hh_rlhf.sh")  # which installs where it lies
        words += ["--nproc", "2", "--out", fresh, "--", *SHORT.split()]
    return shlex.join(words)


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": folders, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def must(done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
