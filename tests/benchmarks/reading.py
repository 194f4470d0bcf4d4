"""CPU seconds to read and tokenize pairs, with the code of another commit and with this one.

    git worktree add /tmp/before COMMIT
    python -m tests.benchmarks.reading /tmp/before --model MODEL --data pairs.jsonl.gz

Each side reads the same file with its own `rm.data.dataset`, in a process of its own; they take turns, and the side
that begins alternates. Ratios are this commit's CPU seconds over the other's, of the same turn.
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
SIDE = """
import json, sys, time
from rm.data import dataset
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer

_, model, file, max_length = sys.argv
tokenizer = Tokenizer(model)
for line in sys.stdin:
    began = time.process_time()
    examples, _ = dataset.read(Task.PREFERENCE, [file], tokenizer, int(max_length))
    print(json.dumps({"cpu": time.process_time() - began, "hash": examples.hash}), flush=True)
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
    page.add(f"{len(records):,} pairs, {args.warmup} warm-up and {args.steps} timed turns.\n", table(head, rows))
    page.finish()


def with_prompt(record: dict) -> dict:
    """A pair of full texts, cut behind their last common "Assistant:"."""
    end = os.path.commonprefix([record["chosen"], record["rejected"]]).rindex("Assistant:") + len("Assistant:")
    return {"prompt": record["chosen"][:end], "chosen": record["chosen"][end:], "rejected": record["rejected"][end:]}


def compare(args, file: Path) -> list[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sides = []
    for repo in (args.before.resolve(), ROOT):
        command = [sys.executable, "-c", SIDE, str(Path(args.model).resolve()), str(file), str(args.max_length)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        side = subprocess.Popen(command, cwd=repo, env=environment | {"PYTHONPATH": str(repo)}, **pipes)
        sides.append((side, []))
    for turn in range(args.warmup + args.steps):
        for side, results in sides if turn % 2 else sides[::-1]:
            side.stdin.write("\n")
            side.stdin.flush()
            results.append(json.loads(side.stdout.readline()))
    for side, _ in sides:
        side.stdin.close()
        side.wait()
    assert len({result["hash"] for _, results in sides for result in results}) == 1, "the examples differ"
    before, now = ([result["cpu"] for result in results[args.warmup :]] for _, results in sides)
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in (before, now)]
    return [*cells, f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", f"{min(now) / min(before):.3f}"]


if __name__ == "__main__":
    main()
