"""Convert HH-RLHF to the recipe's files: texts for SFT, pairs for the reward model and, optionally, test pairs.

    python -m rm.prepare_hh train.jsonl.gz --output_dir data/hh_rlhf                     10,000 texts, 12,000 pairs
    python -m rm.prepare_hh *.jsonl.gz --output_dir data/hh_rlhf --sft 1000 --rm 2000 --test all

FILE is a file, or a name on the hub such as hub:Anthropic/hh-rlhf/helpful-base/train.jsonl.gz. It contains Anthropic's
records ("chosen" and "rejected" with full texts), Dahoas' (with a separate "prompt"), or any other preferences that
train_rm.py reads.

    OUT/sft.json    {"type": "text_only", "instances": [{"text": "###Human: ...###Assistant: ..."}, ...]}
    OUT/rm.json     {"instances": [{"positive": "###Human: ...###Assistant: ...", "negative": ...}, ...]}
    OUT/test.json   like rm.json

Every conversation is in one file only, and its records are adjacent there, so that the last part of rm.json is a fair
validation set. Conversations are drawn at random; the same command with the same --seed writes the same files.
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

from rm import cli
from rm.data.conversation import key
from rm.data.messages import WRITTEN, Message
from rm.data.reader import KeySettings, SampleReader
from rm.data.sample import turns
from rm.data.schemas import PREFERENCE
from rm.distributed import process_group as dist
from rm.files import write_together
from rm.hf import hub

NAMES = {"user": "Human", "assistant": "Assistant"}
Pair = tuple[str, str]  # the better text first


def format_dialogue(dialogue: list[Message]) -> str:
    """The dialogue in the recipe's format, each message without surrounding white space."""
    return "".join(f"###{NAMES[message['role']]}: {message['content'].strip()}" for message in dialogue)


def read_pairs(paths: list[str], keys: KeySettings | None = None) -> tuple[dict[int, list[Pair]], Counter]:
    """Read preference files.

    Returns:
        The usable pairs of every conversation (by `rm.data.conversation.key`), in the files' order, and how many
        pairs were left out for which reason.

    Raises:
        ValueError: a record is not a preference; the message says where it is.
    """
    conversations: dict[int, list[Pair]] = {}
    seen: set[Pair] = set()
    left_out: Counter = Counter()
    for located in SampleReader(PREFERENCE, keys).read(paths):
        try:
            is_tied = located.sample.is_tied
        except ValueError as error:
            raise ValueError(f"{located.where}: {error}") from None
        if is_tied:
            left_out["neither reply is better"] += 1
            continue
        chosen, rejected = located.sample.best_and_worst()
        reason = "tools, which have no place" if located.sample.tools else exclusion_reason(chosen, rejected)
        if reason:
            left_out[reason] += 1
            continue
        pair = format_dialogue(chosen), format_dialogue(rejected)
        if pair in seen:
            left_out["repeated pair"] += 1
            continue
        seen.add(pair)
        conversations.setdefault(key(chosen), []).append(pair)
    return conversations, left_out


def exclusion_reason(chosen: list[Message], rejected: list[Message]) -> str | None:
    """Why a pair cannot be written in the recipe's format, or None if it can."""
    for dialogue in (chosen, rejected):
        roles = [message["role"] for message in dialogue]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            return "turns are not Human, Assistant, Human, ..."
        if any(message.keys() & set(WRITTEN) for message in dialogue):
            return "thoughts or calls, which have no place"
        if not dialogue[-1]["content"].strip():
            return "blank reply"
        # A message that contains a mark such as "###Human:" would be read back as two messages.
        stripped = [message | {"content": message["content"].strip()} for message in dialogue]
        if turns(format_dialogue(dialogue)) != stripped:
            return "turn mark inside a message"
    if format_dialogue(chosen[:-1]) != format_dialogue(rejected[:-1]):
        return "different prompts"
    if format_dialogue(chosen) == format_dialogue(rejected):
        return "identical sides"
    return None


def draw(conversations: dict[int, list[Pair]], sizes: dict[str, float], seed: int) -> dict[str, list[Pair]]:
    """Distribute whole conversations, in random order, over the files until each has its size.

    The last conversation of a file is cut short if the file would become too large.

    Args:
        sizes: number of pairs per file; `math.inf` for all that the other files leave.

    Raises:
        ValueError: there are too few pairs.
    """
    order = list(conversations)
    random.Random(seed).shuffle(order)
    drawn: dict[str, list[Pair]] = {name: [] for name in sizes}
    by_size = sorted(sizes, key=sizes.get)  # files of limited size are filled before one that takes the rest
    for conversation in order:
        unfilled = [name for name in by_size if len(drawn[name]) < sizes[name]]
        if not unfilled:
            break
        name, pairs = unfilled[0], conversations[conversation]
        if sizes[name] < math.inf:
            pairs = pairs[: sizes[name] - len(drawn[name])]
        drawn[name] += pairs
    for name, size in sizes.items():
        too_few = not drawn[name] if size == math.inf else len(drawn[name]) < size
        if too_few:
            available = sum(map(len, conversations.values()))
            requested = ", ".join(f"--{name} {format_size(size)}" for name, size in sizes.items())
            raise ValueError(
                f"{available:,} usable pairs of {len(conversations):,} conversations are too few for {requested}"
            )
    return drawn


def parse_size(text: str) -> float:
    """The value of --sft, --rm or --test: a number, or "all" (`math.inf`) for the pairs that the other files leave."""
    if text == "all":
        return math.inf
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'expected a number or "all", got {text!r}')
    return int(text)


def format_size(size: float) -> str:
    return "all" if size == math.inf else str(size)


def file_content(name: str, pairs: list[Pair]) -> dict:
    """The content of OUT/`name`.json in LMFlow's JSON format; for SFT, the better texts of the pairs."""
    if name == "sft":
        return {"type": "text_only", "instances": [{"text": better} for better, _ in pairs]}
    return {"instances": [{"positive": better, "negative": worse} for better, worse in pairs]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, size = parser.add_argument, parse_size
    add("files", metavar="FILE", nargs="+", help="preferences: files or names on the hub")
    add("--output_dir", metavar="OUT", type=Path, required=True, help="where the files go; none is overwritten")
    add("--sft", metavar="N", type=size, default=10_000, help='texts for SFT, or "all" the rest (default %(default)s)')
    add("--rm", metavar="N", type=size, default=12_000, help="pairs for the reward model (default %(default)s)")
    add("--test", metavar="N", type=size, default=0, help="pairs to test it on (default %(default)s)")
    KeySettings.add_flags(parser)
    add("--seed", type=int, default=0, help="random seed of the draw (default %(default)s)")
    args = parser.parse_args(argv)

    sizes = {name: getattr(args, name) for name in ("sft", "rm", "test") if getattr(args, name)}
    if not sizes:
        raise ValueError("--sft, --rm and --test are all 0: at least one of them must be positive")
    files = [path for file in args.files for path in hub.data(file)]
    conversations, left_out = read_pairs(files, KeySettings.of(args))
    dist.say(f"{sum(map(len, conversations.values())):,} usable pairs of {len(conversations):,} conversations")
    for reason, count in left_out.most_common():
        dist.say(f"left out: {count:,} ({reason})")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    drawn = draw(conversations, sizes, args.seed)
    contents = {
        args.output_dir / f"{name}.json": json.dumps(file_content(name, pairs), ensure_ascii=False, indent=1) + "\n"
        for name, pairs in drawn.items()
    }
    for file, content in contents.items():  # the same one is of this command, which was killed between two files
        if file.exists() and file.read_bytes() != content.encode():
            raise ValueError(f"{file} exists already: choose another --output_dir")
    write_together({file: [content] for file, content in contents.items()})
    for name, pairs in drawn.items():
        dist.say(f"{args.output_dir}/{name}.json: {len(pairs):,} {'texts' if name == 'sft' else 'pairs'}")


if __name__ == "__main__":
    with cli.one_line_errors(), dist.session(seed=0):
        main()
