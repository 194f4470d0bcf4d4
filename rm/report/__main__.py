"""`python -m rm.report RUN`: see `rm.report.training`."""

import sys

from rm.cli import one_line_errors
from rm.report import training

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(training.__doc__)
with one_line_errors():
    print(training.write(sys.argv[1]))
