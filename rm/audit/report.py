"""The report of an audit: `make_report` computes it as a JSON-serializable dict, `format_report` prints it as text."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rm.audit import checks
from rm.audit.checks import Finding
from rm.audit.index import Pairs, read_pairs, read_texts
from rm.data import chat, dataset
from rm.data.encode import Task
from rm.data.reader import KeySettings
from rm.data.split import held_out
from rm.data.tokenizer import Tokenizer
from rm.hf import hub


def make_report(args: argparse.Namespace) -> dict:
    """Run all checks that the arguments (`rm.audit.__main__.parser`) ask for.

    Returns:
        "sets": the report of each set of pairs (`_report_set`): `args.files`, and `args.eval` if given.
        "across": findings between the training, held-out and SFT data.
        "held_out": the number of held-out pairs; absent if there are none.

    Raises:
        ValueError: arguments that exclude each other, or input that cannot be read.
    """
    _check_arguments(args)
    keys = KeySettings.of(args)
    pairs = read_pairs(args.files, keys)
    report = {"sets": [_report_set(pairs, args.files, args, keys)], "across": []}
    if args.eval:
        train, test = pairs, read_pairs(args.eval, keys)
        report["sets"].append(_report_set(test, args.eval, args, keys))
    elif args.split:
        mask = held_out(pairs.conversation, args.split, args.split_by)
        train, test = pairs.select(~mask), pairs.select(mask)
    else:
        return report
    findings = checks.check_against_training(test, train)
    if args.sft:
        findings += checks.check_against_sft(test, read_texts(args.sft, keys))
    return report | {"held_out": len(test), "across": [asdict(finding) for finding in findings]}


def _check_arguments(args: argparse.Namespace) -> None:
    if args.eval and args.split:
        raise ValueError("--eval and --split exclude each other: give only one")
    if args.max_length is not None and not args.tokenizer:
        raise ValueError("--max_length counts tokens: give --tokenizer as well")
    if args.chat_template and args.dialogue_format:
        raise ValueError("--chat_template and --dialogue_format exclude each other: give only one")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"--max_length must be positive, got {args.max_length}")
    if args.sft and not (args.eval or args.split):
        raise ValueError("--sft is compared with held-out pairs: give --eval or --split as well")


def _report_set(pairs: Pairs, files: list[str], args: argparse.Namespace, keys: KeySettings) -> dict:
    """The findings, subset statistics and lengths of one set of pairs."""
    findings = checks.check_pairs(pairs)
    if args.tokenizer:
        truncation_findings, lengths = _token_lengths(pairs, files, args, keys)
        findings += truncation_findings
    else:
        lengths = checks.length_histogram(pairs.length.max(1)) | {"unit": "characters"}
    return {
        "files": files,
        "n": len(pairs),
        "schemas": pairs.schemas,
        "passed over": pairs.passed_over,
        "conversations": len(np.unique(pairs.conversation)),
        "findings": [asdict(finding) for finding in findings],
        "subsets": checks.subset_statistics(pairs),
        "lengths": lengths,
    }


def _token_lengths(
    pairs: Pairs, files: list[str], args: argparse.Namespace, keys: KeySettings
) -> tuple[list[Finding], dict]:
    """Lengths in tokens as training counts them (with BOS and EOS), and the effect of truncation to --max_length.

    Returns:
        Findings about the pairs whose sides would be identical after truncation, and the histogram of lengths.
    """
    tokenizer = Tokenizer(hub.tokenizer_folder(hub.model(args.tokenizer, weights=False)))
    template = chat.choose_template(args.chat_template, args.dialogue_format, tokenizer)
    examples, report = dataset.read(Task.PREFERENCE, files, tokenizer, sys.maxsize, template, keys=keys)
    pair_of_record = {record: pair for pair, record in enumerate(pairs.record.tolist())}
    longest_reply = np.maximum.reduceat(examples.reply_lengths, examples.reply_offsets[:-1])
    full_lengths = examples.prefix_lengths + longest_reply
    lengths = checks.length_histogram(full_lengths) | {"unit": "tokens", "left out": report.dropped}
    if args.max_length is None:
        return [], lengths

    too_long = np.flatnonzero(full_lengths > args.max_length)
    kept_part = {
        "right": slice(args.max_length),
        "left": slice(-args.max_length, None),
    }  # truncated side -> what is kept
    identical = {side: np.zeros(len(pairs), bool) for side in kept_part}
    for i in too_long:
        example = examples[i]
        first, *others = (np.concatenate([example.prefix, reply]) for reply in example.replies)
        for side, part in kept_part.items():
            # Examples that training would drop are missing here, so they are matched to pairs by their record.
            identical[side][pair_of_record[int(examples.record[i])]] = all(
                np.array_equal(first[part], other[part]) for other in others
            )
    findings = []
    for side, mask in identical.items():
        about = f"more than {args.max_length} tokens, and identical sides after truncation on the {side}"
        findings.append(Finding.from_mask(f"cut {side}", "warning", about, mask, pairs))
    return findings, lengths | {"max_length": args.max_length, "longer": len(too_long)}


def positive_findings(report: dict, severities: Sequence[str]) -> list[dict]:
    """The findings of the given severities that concern at least one pair."""
    findings = [finding for part in report["sets"] for finding in part["findings"]] + report["across"]
    return [finding for finding in findings if finding["count"] and finding["severity"] in severities]


def format_report(report: dict) -> list[str]:
    """The report as lines for a terminal."""
    lines = []
    for part in report["sets"]:
        schemas = " and ".join(f"{name} ({count:,})" for name, count in part["schemas"].items())
        passed_over = ", ".join(map(dataset.shown, part["passed over"])) or "none"
        lines += [
            f"{part['n']:,} pairs of {part['conversations']:,} conversations: {', '.join(part['files'])}",
            f"{schemas}; keys passed over: {passed_over}",
            "",
        ]
        lines += _format_findings(part["findings"], part["files"])
        lines += [*_format_subsets(part["subsets"]), "", *_format_lengths(part["lengths"]), ""]
    if report["across"]:
        held_out_files = report["sets"][-1]["files"]
        lines += [f"{report['held_out']:,} held-out pairs", ""]
        lines += _format_findings(report["across"], held_out_files)
    errors = _count_of(len(positive_findings(report, ["error"])), "error")
    warnings = _count_of(len(positive_findings(report, ["warning"])), "warning")
    return [*lines, f"checks with findings: {errors}, {warnings}"]


def _count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _format_findings(findings: list[dict], files: list[str]) -> list[str]:
    lines, indent = [], " " * 12
    for finding in findings:
        if finding["count"]:
            count, share = f"{finding['count']:,}", f"{finding['share']:.2%}"
            lines.append(f"  {finding['severity']:10}{finding['name']}: {count} ({share}), {finding['about']}")
            locations = [_shorten(location, files) for location in finding["where"]]
            if finding["count"] > len(locations):
                locations.append("...")
            lines.append(indent + "; ".join(locations))
    without = [finding["name"] for finding in findings if not finding["count"]]
    if without:
        lines.append(f"  {'none':10}{', '.join(without)}")
    return [*lines, ""]


def _shorten(location: str, files: list[str]) -> str:
    """A location with its file's name instead of the path, or without a file if the set has only one."""
    for file in files:
        shortened = f"{Path(file).name} " if len(files) > 1 else ""
        location = location.replace(f"{file} ", shortened)
    return location


def _format_subsets(subsets: list[dict]) -> list[str]:
    columns = [name for name in subsets[0] if name not in ("subset", "n")]
    width = max(len(subset["subset"]) for subset in subsets) + 2
    lines = [f"  {'subset':{width}}{'pairs':>9}" + "".join(f"  {name}" for name in columns)]
    for subset in subsets:
        shares = "".join(f"  {subset[name]:>{len(name)}.1%}" for name in columns)
        lines.append(f"  {subset['subset']:{width}}{subset['n']:>9,}{shares}")
    return lines


def _format_lengths(lengths: dict) -> list[str]:
    edges, counts = lengths["edges"], lengths["counts"]
    median, q95, longest = (f"{lengths[q]:,}" for q in ("q50", "q95", "q100"))
    lines = [f"  {lengths['unit']} of the longer side: median {median}, 95 % {q95}, longest {longest}"]
    if "longer" in lengths:
        lines.append(f"  {lengths['longer']:,} are longer than {lengths['max_length']}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * -(-count * 50 // max(counts))  # rounded up, so that every count above 0 is visible
        lines.append(f"  {low:>9,} to {high:>9,} {count:>9,} {bar}".rstrip())
    return lines
