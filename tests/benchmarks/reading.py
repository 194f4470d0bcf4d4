"""CPU seconds to read and tokenize pairs, with the code of another commit and with this one.

    git worktree add /tmp/before COMMIT
    python -m tests.benchmarks.reading /tmp/before --model MODEL --data pairs.jsonl.gz

Each turn, each side reads the same file several times with its own `rm.data.dataset`, in a new process: the time of
the tokenizer alone, which both share, differs by a tenth from process to process. The side that begins alternates.
Ratios are this commit's CPU seconds over the other's, of the same turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rm.data.records import read_records
from tests.benchmarks.common import Page, flags, table

ROOT = Path(__file__).parents[2]
READS = 6  # in each process
SIDE = """
import hashlib, json, sys, time
from rm.data import dataset
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer

_, model, file, max_length, reads = sys.argv
tokenizer = Tokenizer(model)
for _ in range(int(reads)):
    began = time.process_time()
    examples, _ = dataset.read(Task.PREFERENCE, [file], tokenizer, int(max_length))
    seconds, digest = time.process_time() - began, hashlib.sha256()
    for name in ("tokens", "reply_lengths", "grade"):
        digest.update(getattr(examples, name).tobytes())
    print(json.dumps({"cpu": seconds, "hash": digest.hexdigest()}), flush=True)
"""


def main() -> None:
    parser = flags(__doc__, steps=9)
    parser.add_argument("before", type=Path, help="a checkout of the other commit")
    args = parser.parse_args()
    records = [record for path in args.data for _, record in read_records(path)][: args.records]
    forms = {"full texts": records, "a prompt and replies": list(map(with_prompt, records))}
    page, rows = Page("Reading and tokenizing against another commit", args), []
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in forms.items():
            file = Path(folder, "pairs.jsonl")
            file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            rows.append([name, *compare(args, file)])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.before, capture_output=True, text=True)
    head = ["", f"{commit.stdout.strip()}, CPU s: median (min)", "this commit: median (min)", "ratio: median",
            "quartiles", "of the minima"]  # fmt: skip
    timed = f"{args.steps} turns, of each the median of {READS - args.warmup} readings"
    page.add(f"{len(records):,} pairs, {timed}.\n", table(head, rows))
    page.finish()


def with_prompt(record: dict) -> dict:
    """A pair of full texts, cut behind their last common "Assistant:"."""
    end = os.path.commonprefix([record["chosen"], record["rejected"]]).rindex("Assistant:") + len("Assistant:")
    return {"prompt": record["chosen"][:end], "chosen": record["chosen"][end:], "rejected": record["rejected"][end:]}


def compare(args, file: Path) -> list[str]:
    before, now, hashes = [], [], set()
    for turn in range(args.steps):
        sides = [(args.before.resolve(), before), (ROOT, now)]
        for repo, seconds in sides if turn % 2 else sides[::-1]:
            results = read_in(repo, args, file)
            seconds.append(statistics.median(result["cpu"] for result in results))
            hashes.update(result["hash"] for result in results)
    assert len(hashes) == 1, "the examples differ"
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in (before, now)]
    return [*cells, f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", f"{min(now) / min(before):.3f}"]


def read_in(repo: Path, args, file: Path) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", SIDE, str(Path(args.model).resolve()), str(file), str(args.max_length), str(READS)]
    done = subprocess.run(command, cwd=repo, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(json.loads, done.stdout.splitlines()))[args.warmup :]


if __name__ == "__main__":
    main()
