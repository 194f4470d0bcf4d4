"""Write the HTML report of a training run: its curves, drawn from metrics.jsonl.

python -m rm.report runs/rm        writes runs/rm/report.html; also works while the run is still in progress
"""

import sys

from rm.cli import one_line_errors
from rm.report import training


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with one_line_errors():
        print(training.write_training_report(sys.argv[1]))


if __name__ == "__main__":
    main()
