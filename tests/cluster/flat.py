"""Check that memory, open files and threads stay constant over thousands of steps with a checkpoint every 50.

    python -m tests.cluster.flat [--steps 5000]         about 6 minutes

Samples are taken once a second. A row of the table has the highest values within a tenth of the steps. The last row
must not exceed the second by more than 5 % of memory, nor have more files or threads. (The first includes startup.)
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
    """(anonymous resident memory in MB, open files, threads) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s*(\d+)", status).group(1)) for name in ("RssAnon", "Threads"))
    return memory / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def watch(folder: Path, steps: int) -> list[tuple[float, int, int]]:
    """The highest samples within every tenth of the steps of a training run."""
    flags = lab.training(lab.make_world(folder / "world"), folder / "out", steps, 50, global_batch_size=2)
    tenths: list[list] = [[] for _ in range(10)]
    with open(folder / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, *flags], env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            step = len(lab.logged_steps((folder / "log").read_text()))
            if 0 < step < steps:
                tenths[10 * step // steps].append(sample(process.pid))
            time.sleep(1)
    assert process.returncode == 0, (folder / "log").read_text()[-2000:]
    return [tuple(map(max, zip(*samples, strict=True))) for samples in tenths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for all files, which is kept")
    args = parser.parse_args()
    with lab.scenarios(args) as folder:
        rows = watch(folder, args.steps)
    print(f"{lab.machine()}\n\n| steps | memory, MB | open files | threads |\n|---|---|---|---|")
    for tenth, (memory, files, threads) in enumerate(rows, 1):
        print(f"| to {tenth * args.steps // 10} | {memory:.0f} | {files} | {threads} |")
    (memory, files, threads), (last_memory, last_files, last_threads) = rows[1], rows[-1]
    grown = last_memory > 1.05 * memory or last_files > files or last_threads > threads
    sys.exit("memory, open files or threads have grown" if grown else 0)


if __name__ == "__main__":
    main()
