"""CPU seconds to read and tokenize pairs, with the code of another commit and with this one.

    git worktree add /tmp/before COMMIT
    python -m tests.benchmarks.reading /tmp/before --model MODEL --data pairs.jsonl.gz

Each turn starts a process for each side, since the time of the tokenizer, which both share, differs by a tenth from
process to process. The two read the same file with their own `rm.data.dataset`, one read after the other, so that a
machine that gets slower disturbs both. Ratios are this commit's CPU seconds over the other's, of the same turn.

With `--instructions`, each side also runs under valgrind, which counts instructions: the count does not depend on what
else the machine does.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rm.data.records import read_records
from tests.benchmarks.common import Page, flags, table

ROOT = Path(__file__).parents[2]
READS = 6  # in each process
COUNTED = (2, 6)  # reads in the two processes whose instructions are counted: the difference has no start in it
SIDE = """
import hashlib, json, sys, time
from rm.data import dataset
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer

_, model, file, max_length = sys.argv
tokenizer = Tokenizer(model)
for _ in sys.stdin:  # a line for each reading
    began = time.process_time()
    examples, _ = dataset.read(Task.PREFERENCE, [file], tokenizer, int(max_length))
    seconds, digest = time.process_time() - began, hashlib.sha256()
    for name in ("tokens", "reply_lengths", "grade"):
        digest.update(getattr(examples, name).tobytes())
    print(json.dumps({"cpu": seconds, "hash": digest.hexdigest()}), flush=True)
"""
VALGRIND = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]


def main() -> None:
    parser = flags(__doc__, steps=9)
    parser.add_argument("before", type=Path, help="a checkout of the other commit")
    parser.add_argument("--instructions", action="store_true", help="count them too, with valgrind; takes minutes")
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
    head += ["instructions: ratio (10^9 a reading)"] if args.instructions else []
    timed = f"{args.steps} turns, of each the median of {READS - args.warmup} readings"
    page.add(f"{len(records):,} pairs, {timed}.\n", table(head, rows))
    page.finish()


def with_prompt(record: dict) -> dict:
    """A pair of full texts, cut behind their last common "Assistant:"."""
    end = os.path.commonprefix([record["chosen"], record["rejected"]]).rindex("Assistant:") + len("Assistant:")
    return {"prompt": record["chosen"][:end], "chosen": record["chosen"][end:], "rejected": record["rejected"][end:]}


def compare(args, file: Path) -> list[str]:
    sides = [args.before.resolve(), ROOT]
    seconds, hashes = {repo: [] for repo in sides}, set()
    for turn in range(args.steps):
        order = sides if turn % 2 else sides[::-1]
        for repo, results in read_alternately(order, args, file).items():
            seconds[repo].append(statistics.median(result["cpu"] for result in results[args.warmup :]))
            hashes.update(result["hash"] for result in results)
    assert len(hashes) == 1, "the examples differ"
    before, now = (seconds[repo] for repo in sides)
    low, middle, high = statistics.quantiles((b / a for a, b in zip(before, now, strict=True)), n=4)
    cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in (before, now)]
    cells += [f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", f"{min(now) / min(before):.3f}"]
    if args.instructions:
        before, now = (instructions(repo, args, file) for repo in sides)
        cells.append(f"{now / before:.3f} ({before / 1e9:.2f}, {now / 1e9:.2f})")
    return cells


def read_alternately(repos: list[Path], args, file: Path) -> dict[Path, list[dict]]:
    """The results of each repository's process, which wait for each other."""
    processes = {repo: start(repo, args, file, stdin=subprocess.PIPE) for repo in repos}
    results = {repo: [] for repo in repos}
    for _ in range(READS):
        for repo, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            results[repo].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return results


def instructions(repo: Path, args, file: Path) -> float:
    """Of one reading."""
    counts = []
    for reads in COUNTED:
        process = start(repo, args, file, VALGRIND, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        _, said = process.communicate("\n" * reads)
        (count,) = re.findall(r"I +refs: +([\d,]+)", said)
        counts.append(int(count.replace(",", "")))
    return (counts[1] - counts[0]) / (COUNTED[1] - COUNTED[0])


def start(repo: Path, args, file: Path, under: Sequence[str] = (), **pipes: int) -> subprocess.Popen:
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    environment |= {"PYTHONPATH": str(repo)}
    command = [*under, sys.executable, "-c", SIDE, str(Path(args.model).resolve()), str(file), str(args.max_length)]
    return subprocess.Popen(command, cwd=repo, env=os.environ | environment, stdout=subprocess.PIPE, text=True, **pipes)


if __name__ == "__main__":
    main()
