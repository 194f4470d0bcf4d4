"""Memory, open files and threads of a training over thousands of steps, a checkpoint every 50: they stay what they are.

    python -m tests.cluster.flat [--steps 5000]         about 6 minutes

A row is the highest that was seen, once a second, within a tenth of the steps; the last must not exceed the second by
more than 5 % of memory (the first has the start in it), nor have more files or threads.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import lab


def sample(pid: int) -> tuple[float, int, int]:
    """(MB of memory of its own, open files, threads) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s*(\d+)", status).group(1)) for name in ("RssAnon", "Threads"))
    return memory / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def watch(folder: Path, steps: int) -> list[tuple[float, int, int]]:
    """The highest samples of every tenth of a training."""
    flags = lab.training(lab.make_world(folder / "world"), folder / "out", steps, 50, global_batch_size=2)
    tenths: list[list] = [[] for _ in range(10)]
    with open(folder / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, *flags], env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            step = len(lab.steps_said((folder / "log").read_text()))
            if 0 < step < steps:
                tenths[10 * step // steps].append(sample(process.pid))
            time.sleep(1)
    assert process.returncode == 0, (folder / "log").read_text()[-2000:]
    return [tuple(map(max, zip(*samples, strict=True))) for samples in tenths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that stays, to look into afterwards")
    args = parser.parse_args()
    with lab.scenarios(args) as folder:
        rows = watch(folder, args.steps)
    print(f"{lab.machine()}\n\n| steps | memory, MB | open files | threads |\n|---|---|---|---|")
    for tenth, (memory, files, threads) in enumerate(rows, 1):
        print(f"| to {tenth * args.steps // 10} | {memory:.0f} | {files} | {threads} |")
    (memory, *second), (memory_last, *last) = rows[1], rows[-1]
    sys.exit("not flat" if memory_last > 1.05 * memory or any(b > a for a, b in zip(second, last, strict=True)) else 0)


if __name__ == "__main__":
    main()
