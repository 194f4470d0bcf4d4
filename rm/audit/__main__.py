"""Check preference data before training or evaluating on it.

    python -m rm.audit pairs.jsonl.gz [more files]                     flaws within a set of pairs
    python -m rm.audit train.json --eval test.json --sft sft.json      and leaks between training, evaluation and SFT
    python -m rm.audit pairs.json --split 10                           and leaks across a training run's own split
    python -m rm.audit pairs.json --tokenizer MODEL --max_length 512   lengths in tokens, and the effect of truncation

Exit status: 1 if there are findings as severe as --fail_on (an error, by default), 2 if the input cannot be read,
otherwise 0.
"""

import argparse
import json
import sys
from pathlib import Path

from rm import cli
from rm.audit.report import format_report, make_report, positive_findings
from rm.data import chat
from rm.data.reader import KeySettings
from rm.data.split import SPLITS
from rm.distributed import process_group as dist
from rm.files import write_atomically
from rm.hf import hub

FAIL_ON = {"never": (), "error": ("error",), "warning": ("error", "warning")}  # --fail_on: severities that fail


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rm.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="preferences: files or names on the hub, as for train_rm.py")
    add("--eval", metavar="FILE", nargs="+", default=[], help="preferences to evaluate on")
    add("--sft", metavar="FILE", nargs="+", default=[], help="texts used for SFT")
    add(
        "--split", metavar="PCT", type=float, default=0.0, help="hold out PCT %%, as --validation_split_percentage does"
    )
    add("--split_by", choices=SPLITS, default=SPLITS[0], help="as --validation_split_by (default %(default)s)")
    add("--tokenizer", metavar="MODEL", help="model folder or name on the hub: count its tokens, not characters")
    add("--chat_template", metavar="FILE", help="with --tokenizer: a chat template, as for train_rm.py")
    add(
        "--dialogue_format", choices=tuple(chat.DIALOGUE_FORMATS), help="with --tokenizer: plain format, as in training"
    )
    add("--max_length", metavar="N", type=int, help="with --tokenizer: find pairs that truncation to N would spoil")
    KeySettings.add_flags(parser)
    add("--json", metavar="FILE", type=Path, help="also write the report to FILE as JSON")
    add("--fail_on", choices=FAIL_ON, default="error", help="lowest severity for status 1 (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the report; returns the exit status of the process."""
    args = parser().parse_args(argv)
    args.files = [path for file in args.files for path in hub.data(file)]
    args.eval = [path for file in args.eval for path in hub.data(file)]
    args.sft = [path for file in args.sft for path in hub.data(file)]
    args.chat_template = args.chat_template and hub.template(args.chat_template)
    report = make_report(args)
    for line in format_report(report):
        dist.say(line)
    if args.json:
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    return 1 if positive_findings(report, FAIL_ON[args.fail_on]) else 0


if __name__ == "__main__":
    cli.end_with_the_pipe()
    with cli.one_line_errors(), dist.session(seed=0):
        sys.exit(main())
