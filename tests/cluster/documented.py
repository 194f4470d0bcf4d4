"""Run every command of README.md and docs/ as it is written.

    python -m tests.cluster.documented [--only TEXT]

What is small is the world around a command: a folder with the repository's scripts and the files that the pages name
(MODEL, pairs.jsonl.gz, runs/rm/model, ...), made from the quickstart's synthetic data; a cache of the hub that has the
repositories they name, with little in them, and no network; a .venv that is the Python of this test. Every command gets
a copy, in which the folder that it writes is not there yet. Its words stay as they are, with two exceptions:

- `...` is no command line. The flags that are required and that the page leaves out take its place.
- Commands that cannot end here are skipped: `SKIPPED` says why, and where they are run instead.
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

from tests.data.public_records import PREFERENCES
from tests.docs_pages import PAGES, ROOT, commands, without_remark

SKIPPED = {  # part of a command -> reason
    "launch/accept.sh": "needs a GPU; tests/test_acceptance.py",
    "tests/run.sh": "the test suite; CI",
    "pytest": "the test suite; CI",
    "sbatch": "needs SLURM; tests/cluster/slurm.py",
    "multi_node.sh": "needs two machines; tests/cluster/netns.py",
    "rm.serve": "runs until it is stopped; tests/serve/",
    "rm.export --model_name_or_path runs/rm/model --center_rewards": "needs a head with a bias; tests/test_export.py",
    "sglang": "another program",
    "run_v2.py": "another program",
    "tests.benchmarks": "each page names the command that made it",
    "tests.cluster": "these tests themselves",
}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"  # as Tulu's
LEFT_OUT = {  # what `...` stands for: script -> required flags with values, or words
    "train_sft.py": {"--model_name_or_path": "MODEL", "--dataset_path": "sft.json", "--output_dir": "runs/new"},
    "train_rm.py": {"--model_name_or_path": "MODEL", "--dataset_path": "pairs.jsonl.gz", "--output_dir": "runs/new"},
    "eval_rm.py": {"--model_name_or_path": "runs/rm/model", "--dataset_path": "test.jsonl", "--output_dir": "runs/new"},
    "rm.audit": {"pairs.jsonl.gz": ""},
    "rm.prepare_hh": {"hub:Anthropic/hh-rlhf": "", "--output_dir": "data/new"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only commands that contain this text")
    only, failed = parser.parse_args().only, []
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name))
        for page in PAGES:
            for command in dict.fromkeys(commands(page.read_text())):
                if only not in command:
                    continue
                where = f"{page.relative_to(ROOT)}: {command}"
                if reasons := [reason for text, reason in SKIPPED.items() if text in command]:
                    print(f"skipped ({reasons[0]})  {where}", flush=True)
                    continue
                began = time.perf_counter()
                done = world.run_in_copy(without_remark(command))
                result = "FAILED" if done.returncode else "ok"
                print(f"{result} {time.perf_counter() - began:.0f} s  {where}", flush=True)
                if done.returncode:
                    failed.append(where)
                    print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} commands failed")


class World:
    """The files, the hub's cache and the environment in which commands run."""

    def __init__(self, folder: Path):
        self.folder, self.home, self.files = folder, folder / "home", folder / "files"
        for name in ("rm", "tests", "docs", "train_sft.py", "train_rm.py", "eval_rm.py", "setup.py", "pyproject.toml"):
            link(self.files / name, ROOT / name)
        shutil.copytree(ROOT / "launch", self.files / "launch")  # which looks for .venv beside itself
        self.make_venv()
        self.make_data()
        self.make_runs()

    def make_venv(self) -> None:
        """What launch/venv.sh finds installed."""
        bin = self.files / ".venv" / "bin"
        bin.mkdir(parents=True)
        (bin / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bin / "python").chmod(0o755)
        (bin / "activate").touch()  # `run` has the path
        for extras in ("runtime", "report"):
            (bin.parent / f"installed-{extras}").touch()

    def make_data(self) -> None:
        """Models, data files, and repositories of the hub."""
        demo = self.folder / "demo"
        require_success(self.run(f"python -m rm.demo {demo}"))
        config = json.loads((demo / "model" / "config.json").read_text())
        (demo / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
        (demo / "model" / "chat_template.jinja").write_text(TEMPLATE)
        shutil.copytree(demo / "model", self.files / "MODEL")
        for name in ("huggyllama/llama-7b", "allenai/Llama-3.1-Tulu-3-8B-SFT"):
            self.cache(name, "models", demo / "model")

        texts = json.loads((demo / "sft.json").read_text())["instances"][:200]
        pairs = [json.loads(line) for line in open(demo / "rm_train.jsonl")][:200]
        test = [json.loads(line) for line in open(demo / "rm_test.jsonl")][:40]
        for names, records in (
            ("sft.json demonstrations.jsonl data/hh_rlhf/sft.json", texts),
            ("pairs.json train.json pairs.jsonl pairs.jsonl.gz more.parquet data/hh_rlhf/rm.json", pairs),
            ("test.json test.jsonl test.jsonl.gz a.jsonl b.jsonl data/hh_rlhf/test.json", test),
            ("prompts.jsonl", [{"prompt": "###Human: hi###Assistant:", "responses": [" yes", " no", " perhaps"]}] * 4),
            ("helpsteer2.jsonl rated.jsonl", RATED),
            ("RM-Bench/data/total_dataset.json", public("RM-Bench")),
            ("RMB_dataset/pairs.json", public("RMB pairs")),
            ("RMB_dataset/best_of_n.json", public("RMB best of n")),
        ):
            for name in names.split():
                write(self.files / name, records)
        dialogues = [{side: messages(pair[key]) for side, key in SIDES.items()} for pair in pairs]
        for name, file, records in (
            ("Anthropic/hh-rlhf", "helpful-base/train.jsonl.gz", anthropic(23_000)),
            ("Dahoas/full-hh-rlhf", "data/train-00000-of-00001.parquet", anthropic(112_000)),
            ("Dahoas/full-hh-rlhf", "data/test-00000-of-00001.parquet", anthropic(2_000, first=112_000)),
            ("allenai/llama-3.1-tulu-3-8b-preference-mixture", "data/train-00000-of-00001.parquet", dialogues),
            ("allenai/reward-bench", "data/filtered-00000-of-00001.parquet", public("RewardBench")),
            ("allenai/reward-bench-2", "data/test-00000-of-00001.parquet", public("RewardBench 2")),
            ("ScalerLab/JudgeBench", "data/gpt-00000-of-00001.jsonl", public("JudgeBench")),
        ):
            write(self.cache(name, "datasets") / file, records)

    def cache(self, name: str, kind: str, content: Path | None = None) -> Path:
        """The folder of a repository in the cache of huggingface_hub."""
        repository = self.home / "huggingface" / "hub" / f"{kind}--{name.replace('/', '--')}"
        folder = repository / "snapshots" / ("c" * 40)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("c" * 40)
        if content is not None:
            shutil.copytree(content, folder)
        return folder

    def make_runs(self) -> None:
        """What commands on trained models find."""
        short = "--max_steps 2 --save_steps 2 --global_batch_size 8"
        sft = f"--model_name_or_path MODEL --dataset_path sft.json --output_dir runs/sft {short}"
        rm = f"--model_name_or_path runs/sft/model --dataset_path pairs.json --output_dir runs/rm --use_lora {short}"
        evaluation = "--model_name_or_path runs/rm/model --dataset_path test.jsonl --output_dir runs/eval"
        rated = f"--loss regression --attributes {' '.join(ATTRIBUTES)} --dataset_path helpsteer2.jsonl"
        rated += f" --model_name_or_path runs/sft/model --output_dir runs/rated {short}"
        for command in (f"train_sft.py {sft}", f"train_rm.py {rm}", f"train_rm.py {rated}", f"eval_rm.py {evaluation}"):
            require_success(self.run(f"python {command}"))
        runs = self.files / "runs"
        shutil.copytree(runs / "sft", runs / "llama-7b" / "sft")
        (runs / "rm" / "checkpoints" / "step_2").rename(runs / "rm" / "checkpoints" / "step_500")
        for name in ("runs/a/model", "runs/b/model", "runs/c/model", "OTHER"):
            shutil.copytree(runs / "rm" / "model", self.files / name)

    def run_in_copy(self, command: str) -> subprocess.CompletedProcess:
        words = completed(shlex.split(command))
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            copy = Path(name) / "files"
            shutil.copytree(self.files, copy, symlinks=True)
            if any(word.startswith(("--reward_", "--attributes")) for word in words):  # of a model of attributes
                shutil.rmtree(copy / "runs" / "rm")
                (copy / "runs" / "rated").rename(copy / "runs" / "rm")
            if out := output_of(words, copy):
                shutil.rmtree(copy / out, ignore_errors=True)
            return self.run(shlex.join(words), copy)

    def run(self, command: str, folder: Path | None = None) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home),
            "HF_HOME": str(self.home / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        bash = ["bash", "-c", command]
        return subprocess.run(bash, cwd=folder or self.files, env=environment, capture_output=True, text=True)


def completed(words: list[str]) -> list[str]:
    """A command line with the required flags in place of `...`."""
    if "..." not in words:
        return words
    at, script = words.index("..."), next(word for word in words if word in LEFT_OUT)
    missing = {name: value for name, value in LEFT_OUT[script].items() if name not in words}
    if "regression" in words and "--dataset_path" in missing:
        missing["--dataset_path"] = "helpsteer2.jsonl"
    return words[:at] + [word for pair in missing.items() for word in pair if word] + words[at + 1 :]


def output_of(words: list[str], folder: Path) -> str | None:
    """The folder that a command writes: --output_dir, or that of --config."""
    if "--output_dir" in words:
        return words[words.index("--output_dir") + 1]
    if "--config" in words:
        return json.loads((folder / words[words.index("--config") + 1]).read_text())["output_dir"]
    return None


SIDES = {"chosen": "positive", "rejected": "negative"}
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # HelpSteer2's
RATED = [{"prompt": f"What is {n}?", "response": f"It is {n}.", **dict.fromkeys(ATTRIBUTES, n % 5)} for n in range(40)]


def messages(text: str) -> list[dict]:
    """A dialogue of the synthetic data as messages."""
    turns = text.replace("###Human: ", "\0user\1").replace("###Assistant: ", "\0assistant\1").split("\0")[1:]
    return [dict(zip(("role", "content"), turn.split("\1"), strict=True)) for turn in turns]


def anthropic(number: int, first: int = 0) -> list[dict]:
    """Records in the format of Anthropic's files; each is a conversation of its own."""
    texts = (f"\n\nHuman: question {n}?\n\nAssistant:" for n in range(first, first + number))
    return [{"chosen": f"{text} good", "rejected": f"{text} bad"} for text in texts]


def public(name: str) -> list[dict]:
    return [PREFERENCES[name][0]] * 4


def write(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        return pq.write_table(pa.Table.from_pylist(records), file)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if file.suffix == ".json":
        lines = json.dumps(records)
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as out:
        out.write(lines)


def link(file: Path, target: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)


def require_success(done: subprocess.CompletedProcess) -> None:
    """Exit with the output of a command if it failed."""
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
