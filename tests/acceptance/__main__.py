"""Checks that this machine trains right, stage by stage; stops at the first stage that fails.

    bash launch/accept.sh                        all stages
    bash launch/accept.sh --stages kernel steps  only these
    bash launch/accept.sh --fault steps          put a fault into a stage, which must then be refused

It needs the packages of the tests, and no network. On a machine without GPUs it runs what has a meaning on a CPU and
says what it left out. The result is in acceptance.json.
"""

import argparse
import sys
import traceback
from pathlib import Path

from tests.acceptance import numerics, processes, speed
from tests.acceptance.report import Refused, Report

STAGES = {  # in order
    "environment": numerics.environment,
    "kernel": numerics.kernel,
    "attention": numerics.attention,
    "steps": numerics.steps,
    "compile": numerics.compile,
    "ranks": processes.ranks,
    "interruption": processes.interruption,
    "end": processes.end,
    "speed": speed.speed,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="launch/accept.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("acceptance.json"), help="file to write (acceptance.json)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these stages")
    parser.add_argument("--fault", choices=STAGES, help="put a fault into this stage")
    args = parser.parse_args()
    report = Report(args.out, args.fault)
    for name, stage in STAGES.items():
        if name not in args.stages:
            report.skip(name, "left out by --stages")
            continue
        report.begin(name, stage.__doc__.splitlines()[0])
        try:
            stage(report)
            report.end_stage()
        except Refused:
            break
        except Exception as error:  # whatever it is, the record has to say it
            traceback.print_exc()
            report.check("runs without an error", f"{type(error).__name__}: {error}", "no error", False)
            break
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
