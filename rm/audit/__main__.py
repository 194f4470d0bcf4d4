"""Audit preference data before training on it, or evaluating with it.

    python -m rm.audit pairs.jsonl.gz [more files]               what is wrong within
    python -m rm.audit train.json --eval test.json --sft sft.json      and between training, evaluation and SFT
    python -m rm.audit pairs.json --split 10                     and between the two parts of a training's own split
    python -m rm.audit pairs.json --tokenizer MODEL --max_length 512   lengths in tokens, and what truncation would do

Ends with status 1 for findings as bad as --fail_on (an error, by default), 2 for input that cannot be read, else 0.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rm import cli
from rm.audit import checks
from rm.audit.checks import Finding
from rm.audit.index import Pairs, read_pairs, read_texts
from rm.data import chat, dataset
from rm.data.split import SPLITS, held_out
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.hf import hub

SEVERITIES = ("never", "error", "warning")  # --fail_on: each includes those before it


def audit(args: argparse.Namespace) -> dict:
    """The whole report, ready for JSON."""
    if args.eval and args.split:
        raise ValueError("--eval and --split exclude each other: give one")
    if args.max_length is not None and not args.tokenizer:
        raise ValueError("--max_length counts tokens: give the --tokenizer")
    if args.chat_template and args.dialogue_format:
        raise ValueError("--chat_template and --dialogue_format exclude each other: give one")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"--max_length must be positive, got {args.max_length}")
    if args.sft and not (args.eval or args.split):
        raise ValueError("--sft is compared with pairs held out: name them by --eval, or hold some out by --split")
    pairs = train = read_pairs(args.files)
    report = {"sets": [about(pairs, args.files, args)], "across": []}
    test = None
    if args.eval:
        test = read_pairs(args.eval)
        report["sets"].append(about(test, args.eval, args))
    elif args.split:
        mask = held_out(pairs.conversation, args.split, args.split_by)
        train, test = pairs.only(~mask), pairs.only(mask)
    if test is not None:
        across = checks.against_training(test, train)
        across += checks.against_sft(test, read_texts(args.sft)) if args.sft else []
        report |= {"held_out": len(test), "across": [asdict(finding) for finding in across]}
    return report


def about(pairs: Pairs, files: list[str], args: argparse.Namespace) -> dict:
    """One set of pairs: its findings, subsets and lengths."""
    found, lengths = checks.within(pairs), checks.histogram(pairs.length.max(1)) | {"unit": "characters"}
    if args.tokenizer:
        more, lengths = tokens(pairs, files, args)
        found += more
    return {
        "files": files,
        "n": len(pairs),
        "conversations": len(np.unique(pairs.conversation)),
        "findings": [asdict(finding) for finding in found],
        "subsets": checks.subsets(pairs),
        "lengths": lengths,
    }


def tokens(pairs: Pairs, files: list[str], args: argparse.Namespace) -> tuple[list[Finding], dict]:
    """Lengths as training counts them, BOS and EOS included, and the pairs that a cut to --max_length would void."""
    tokenizer = Tokenizer(hub.model(args.tokenizer, weights=False))
    template = chat.choose(args.chat_template, args.dialogue_format, tokenizer)
    examples, report = dataset.pairs(files, tokenizer, sys.maxsize, template)
    whole = examples.prefix_lengths + np.maximum.reduceat(examples.reply_lengths, examples.reply_offsets[:-1])
    lengths = checks.histogram(whole) | {"unit": "tokens", "left out": report.dropped}
    if args.max_length is None:
        return [], lengths
    over = np.flatnonzero(whole > args.max_length)
    void = np.zeros((2, len(pairs)), bool)  # cut on the right, on the left
    for i in over:
        one, *others = (np.concatenate([examples[i].prefix, reply]) for reply in examples[i].replies)
        for cut, part in enumerate((slice(args.max_length), slice(-args.max_length, None))):
            void[cut, examples.record[i]] = all(np.array_equal(one[part], other[part]) for other in others)
    about = f"more than {args.max_length} tokens, and equal once cut on the "
    found = [
        checks.Finding.of(f"cut {side}", "warning", about + side, mask, pairs)
        for side, mask in zip(("right", "left"), void, strict=True)
    ]
    return found, lengths | {"max_length": args.max_length, "longer": len(over)}


def shown(report: dict) -> str:
    """The report for a terminal."""
    lines = []
    for part in report["sets"]:
        lines += [f"{part['n']:,} pairs of {part['conversations']:,} conversations: {', '.join(part['files'])}", ""]
        lines += _findings(part["findings"], part["files"])
        lines += [*_subsets(part["subsets"]), "", *_lengths(part["lengths"]), ""]
    if report["across"]:
        lines += [f"{report['held_out']:,} pairs held out", "", *_findings(report["across"], part["files"])]
    errors, warnings = (len(_found(report, [severity])) for severity in SEVERITIES[1:])
    return "\n".join([*lines, f"checks with findings: {errors} of errors, {warnings} of warnings"])


def _findings(found: list[dict], files: list[str]) -> list[str]:
    lines, indent = [], " " * 12
    for f in found:
        if f["count"]:
            places = [_shorter(place, files) for place in f["where"]] + ["..."] * (f["count"] > len(f["where"]))
            lines += [f"  {f['severity']:10}{f['name']}: {f['count']:,} ({f['share']:.2%}), {f['about']}"]
            lines += [indent + "; ".join(places)]
    none = [f["name"] for f in found if not f["count"]]
    return lines + ([f"  {'none':10}{', '.join(none)}"] if none else []) + [""]


def _shorter(place: str, files: list[str]) -> str:
    """A place without the name of its file, if there is one file, or with no more than its name."""
    for file in files:
        place = place.replace(f"{file} ", f"{Path(file).name} " if len(files) > 1 else "")
    return place


def _subsets(subsets: list[dict]) -> list[str]:
    names = [name for name in subsets[0] if name not in ("subset", "n")]
    width = max(len(subset["subset"]) for subset in subsets) + 2
    lines = [f"  {'subset':{width}}{'pairs':>9}" + "".join(f"  {name}" for name in names)]
    for subset in subsets:
        shares = "".join(f"  {subset[name]:>{len(name)}.1%}" for name in names)
        lines.append(f"  {subset['subset']:{width}}{subset['n']:>9,}{shares}")
    return lines


def _lengths(lengths: dict) -> list[str]:
    edges, counts = lengths["edges"], lengths["counts"]
    half, most, longest = (f"{lengths[q]:,}" for q in ("q50", "q95", "q100"))
    lines = [f"  {lengths['unit']} of the longer side: median {half}, 95 % {most}, longest {longest}"]
    if "longer" in lengths:
        lines.append(f"  {lengths['longer']:,} are longer than {lengths['max_length']}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * -(-count * 50 // max(counts))
        lines.append(f"  {low:>9,} to {high:>9,} {count:>9,} {bar}".rstrip())
    return lines


def _found(report: dict, severities: Sequence[str]) -> list[dict]:
    """What was found of these severities."""
    every = [*(finding for part in report["sets"] for finding in part["findings"]), *report["across"]]
    return [finding for finding in every if finding["count"] and finding["severity"] in severities]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="preferences, or their name on the hub, as train_rm.py reads them")
    add("--eval", metavar="FILE", nargs="+", default=[], help="preferences to evaluate on")
    add("--sft", metavar="FILE", nargs="+", default=[], help="texts of the SFT before")
    add("--split", metavar="PCT", type=float, default=0.0, help="hold out this part, as --validation_split_percentage")
    add("--split_by", choices=SPLITS, default=SPLITS[0], help="how, as --validation_split_by (default %(default)s)")
    add("--tokenizer", metavar="MODEL", help="a model's folder or name: lengths in its tokens instead of characters")
    add("--chat_template", metavar="FILE", help="with --tokenizer: how dialogues are written, as in training")
    add("--dialogue_format", choices=tuple(chat.DIALOGUE_FORMATS), help="with --tokenizer: or how, in plain marks")
    add("--max_length", metavar="N", type=int, help="with --tokenizer: what is longer, and what a cut would do to it")
    add("--json", metavar="FILE", type=Path, help="write the report there, too")
    add("--fail_on", choices=SEVERITIES, default="error", help="what ends with status 1 (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit status."""
    args = parser().parse_args(argv)
    args.files, args.eval, args.sft = (list(map(hub.data, files)) for files in (args.files, args.eval, args.sft))
    report = audit(args)
    print(shown(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if _found(report, SEVERITIES[1 : SEVERITIES.index(args.fail_on) + 1]) else 0


if __name__ == "__main__":
    with cli.one_line_errors(), dist.session(seed=0):
        sys.exit(main())
