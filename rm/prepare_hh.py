"""The recipe's files from HH-RLHF: texts for SFT, pairs for the reward model and, if asked for, pairs for its test.

    python -m rm.prepare_hh train.jsonl.gz --output_dir data/hh_rlhf                     10,000 texts, 12,000 pairs
    python -m rm.prepare_hh *.jsonl.gz --output_dir data/hh_rlhf --sft 1000 --rm 2000 --test all

FILE is a file, or its name on the hub, such as hub:Anthropic/hh-rlhf/helpful-base/train.jsonl.gz: Anthropic's ("chosen"
and "rejected", full texts), Dahoas' ("prompt" beside them), or any other preferences that train_rm.py reads.

    OUT/sft.json    {"type": "text_only", "instances": [{"text": "###Human: ...###Assistant: ..."}, ...]}
    OUT/rm.json     {"instances": [{"positive": "###Human: ...###Assistant: ...", "negative": ...}, ...]}
    OUT/test.json   like rm.json

A conversation goes into one file only, and stands together there, so that the last part of rm.json is a fair
validation set. Conversations are drawn at random by --seed; the same command makes the same files.
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

from rm import cli
from rm.data.conversation import best_and_worst, key, turns
from rm.data.formats import Message
from rm.data.records import read_records
from rm.distributed import process_group as dist
from rm.hf import hub

NAMES = {"user": "Human", "assistant": "Assistant"}
Pair = tuple[str, str]  # the better text first


def written(dialogue: list[Message]) -> str:
    """A dialogue in the recipe's marks, without white space around its turns."""
    return "".join(f"###{NAMES[message['role']]}: {message['content'].strip()}" for message in dialogue)


def read(paths: list[str]) -> tuple[dict[int, list[Pair]], Counter]:
    """The pairs of every conversation, in the files' order, and how many were left out for which reason."""
    conversations, seen, left_out = {}, set(), Counter()
    for where, record in (found for path in paths for found in read_records(path)):
        try:
            sides = [turns(text) for text in best_and_worst(record)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if reason := unfit(*sides):
            left_out[reason] += 1
            continue
        pair = written(sides[0]), written(sides[1])
        if pair in seen:
            left_out["repeated"] += 1
            continue
        seen.add(pair)
        conversations.setdefault(key(sides[0]), []).append(pair)
    return conversations, left_out


def unfit(chosen: list[Message], rejected: list[Message]) -> str | None:
    """Why a pair has no place in the recipe's files, or None."""
    for dialogue in (chosen, rejected):
        roles = [message["role"] for message in dialogue]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            return "whose turns are not Human, Assistant, Human, ..."
        if not dialogue[-1]["content"].strip():
            return "with a blank reply"
        plain = [message | {"content": message["content"].strip()} for message in dialogue]
        if turns(written(dialogue)) != plain:
            return "with a mark inside a turn"
    if written(chosen[:-1]) != written(rejected[:-1]):
        return "with two prompts"
    return "with two equal sides" if written(chosen) == written(rejected) else None


def draw(conversations: dict[int, list[Pair]], sizes: dict[str, float], seed: int) -> dict[str, list[Pair]]:
    """Fill the files, those of a set size first, with whole conversations; the last one of a file may be cut short."""
    order = list(conversations)
    random.Random(seed).shuffle(order)
    drawn, files = {name: [] for name in sizes}, sorted(sizes, key=sizes.get)
    for conversation in order:
        name = next((name for name in files if len(drawn[name]) < sizes[name]), None)
        if name is None:
            break
        room = sizes[name] - len(drawn[name])
        drawn[name] += conversations[conversation][: None if room == math.inf else room]
    for name, size in sizes.items():
        if len(drawn[name]) < size and (size < math.inf or not drawn[name]):
            there = sum(map(len, conversations.values()))
            wanted = ", ".join(f"--{name} {shown(size)}" for name, size in sizes.items())
            raise ValueError(f"{there:,} fit pairs of {len(conversations):,} conversations are too few for {wanted}")
    return drawn


def shown(size: float) -> str:
    return "all" if size == math.inf else str(size)


def count(text: str) -> float:
    """--sft, --rm, --test: a number, or "all" for what the others leave."""
    if text == "all":
        return math.inf
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'expected a number or "all", got {text!r}')
    return int(text)


def document(name: str, pairs: list[Pair]) -> dict:
    """The content of a file, in LMFlow's JSON."""
    if name == "sft":
        return {"type": "text_only", "instances": [{"text": better} for better, _ in pairs]}
    return {"instances": [{"positive": better, "negative": worse} for better, worse in pairs]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="preferences, or their name on the hub")
    add("--output_dir", metavar="OUT", type=Path, required=True, help="where the files go; none is overwritten")
    add("--sft", metavar="N", type=count, default=10_000, help='texts for SFT, or "all" the rest (default %(default)s)')
    add("--rm", metavar="N", type=count, default=12_000, help="pairs for the reward model (default %(default)s)")
    add("--test", metavar="N", type=count, default=0, help="pairs to test it on (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other conversations (default %(default)s)")
    args = parser.parse_args(argv)

    sizes = {name: getattr(args, name) for name in ("sft", "rm", "test") if getattr(args, name)}
    if not sizes:
        raise ValueError("--sft, --rm and --test are all 0: ask for some texts or pairs")
    for name in sizes:
        if (args.output_dir / f"{name}.json").exists():
            raise ValueError(f"{args.output_dir}/{name}.json is there already: name another --output_dir")
    conversations, left_out = read([hub.data(file) for file in args.files])
    print(f"{sum(map(len, conversations.values())):,} fit pairs of {len(conversations):,} conversations")
    for reason, number in left_out.most_common():
        print(f"left out: {number:,} {reason}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, pairs in draw(conversations, sizes, args.seed).items():
        content = json.dumps(document(name, pairs), ensure_ascii=False, indent=1)
        (args.output_dir / f"{name}.json").write_text(content + "\n", encoding="utf-8")
        print(f"{args.output_dir}/{name}.json: {len(pairs):,} {'texts' if name == 'sft' else 'pairs'}")


if __name__ == "__main__":
    with cli.one_line_errors(), dist.session(seed=0):
        main()
