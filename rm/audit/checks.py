"""The checks of an audit. Each one counts the pairs with a certain flaw and names the first of them.

Severity: an *error* makes an evaluation on the pairs concerned meaningless; a *warning* makes their labels useless or
suspicious. `docs/audit.md` says what to do about each.

Shapes: N pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rm.audit.index import Pairs, Texts

MAX_LOCATIONS = 5  # locations listed per finding


@dataclass(frozen=True)
class Finding:
    """The result of one check; `count` is 0 if it found nothing."""

    name: str
    severity: str  # "error" or "warning"
    about: str  # a description for the report
    count: int  # pairs concerned
    share: float  # of all pairs checked
    where: list[str]  # locations of the first MAX_LOCATIONS pairs

    @classmethod
    def from_mask(
        cls,
        name: str,
        severity: str,
        about: str,
        mask: np.ndarray,
        pairs: Pairs,
        location: Callable[[int], str] | None = None,
    ) -> "Finding":
        """A finding about the pairs for which `mask`, (N,) bool, is true.

        Args:
            location: describes where the i-th pair is; `pairs.where[i]` by default.
        """
        first = np.flatnonzero(mask)[:MAX_LOCATIONS]
        where = [location(i) if location else pairs.where[i] for i in first]
        return cls(name, severity, about, int(mask.sum()), float(mask.mean()) if len(mask) else 0.0, where)


def check_pairs(pairs: Pairs) -> list[Finding]:
    """The checks within one set of pairs."""
    identical = pairs.full_hash[:, 0] == pairs.full_hash[:, 1]
    pair_hash, swapped_hash = _combine(pairs.full_hash), _combine(pairs.full_hash[:, ::-1])
    first_occurrence = np.zeros(len(pairs), bool)
    first_occurrence[np.unique(pair_hash, return_index=True)[1]] = True
    checks = {
        "identical": (identical, "both sides are the same text"),
        "swapped": (
            np.isin(pair_hash, swapped_hash) & ~identical,
            "another pair has the same two texts in the opposite order",
        ),
        "duplicated": (~first_occurrence, "an earlier pair has the same two texts in the same order"),
        "prompts differ": (
            pairs.prompt_hash[:, 0] != pairs.prompt_hash[:, 1],
            "the two sides differ before their last turn",
        ),
        "no reply": (~pairs.has_reply.all(1), "the last turn of a side is blank or not the assistant's"),
        "no turns": ((pairs.human_turns == 0).any(1), "a side has no human turn: unknown dialogue format?"),
    }
    findings = [_label_leak("label revealed", "warning", "is continued in another pair's prompt", pairs, pairs)]
    for name, (mask, about) in checks.items():
        findings.append(Finding.from_mask(name, "warning", about, mask, pairs))
    return findings


def check_against_training(held_out: Pairs, train: Pairs) -> list[Finding]:
    """Leaks from training pairs into held-out pairs."""
    # Sorted, so that a pair and its swapped version have the same hash.
    repeated = np.isin(_combine(np.sort(held_out.full_hash)), _combine(np.sort(train.full_hash)))
    return [
        Finding.from_mask("pair in training", "error", "the same two texts are a training pair", repeated, held_out),
        _label_leak("label in training", "error", "is continued in a training pair's prompt", held_out, train),
        _shared_conversation("conversation in training", "a training pair", held_out, train),
    ]


def check_against_sft(held_out: Pairs, texts: Texts) -> list[Finding]:
    """Leaks from SFT texts into held-out pairs."""
    return [
        _label_leak("label in SFT", "error", "is a reply in an SFT text", held_out, texts),
        _shared_conversation("conversation in SFT", "an SFT text", held_out, texts),
    ]


def _label_leak(name: str, severity: str, how: str, pairs: Pairs, others: Texts) -> Finding:
    """Pairs of which exactly one side occurs as a prefix in `others`. If both do, this does not reveal the label."""
    same_set = others is pairs
    # Within one set a pair must not count as a leak of itself, which happens when one side is a prefix of the other.
    from_itself = pairs.continued_by_other if same_set else 0
    quoted = others.prefixes.count(pairs.full_hash) > from_itself
    only_this_side = quoted & ~quoted[:, ::-1]

    def location(i: int) -> str:
        (side,) = np.flatnonzero(only_this_side[i])
        records = others.prefixes.records_with(pairs.full_hash[i, side])
        leak = next(record for record in records if not same_set or record != i)
        return f"{pairs.where[i]} (in {others.where[leak]})"

    better, worse = only_this_side.sum(0)
    about = (
        f"exactly one of the two replies {how}, which reveals the label "
        f"(the better reply of {better:,} pairs, the worse reply of {worse:,})"
    )
    return Finding.from_mask(name, severity, about, only_this_side.any(1), pairs, location)


def _shared_conversation(name: str, source: str, held_out: Pairs, others: Texts) -> Finding:
    """Pairs whose first human turn is also that of one of `others`."""
    mask = np.isin(held_out.conversation, others.conversation)
    return Finding.from_mask(name, "warning", f"{source} has the same first human turn", mask, held_out)


def _combine(hashes: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N,): one int64 hash of two hashes that depends on their order."""
    # An odd multiplier (2**64 divided by the golden ratio), written as a signed int64; the product wraps around.
    return hashes[:, 0] * np.int64(0x9E3779B97F4A7C15 - 2**64) + hashes[:, 1]


def subset_statistics(pairs: Pairs) -> list[dict]:
    """Size, shares of shared conversations and multi-turn dialogues, and length bias of each subset, then of all pairs.

    "accuracy of the longer" is the accuracy of always preferring the longer reply; a tie counts as one half.
    """
    longer = np.where(pairs.tied, 0, np.sign(pairs.reply_length[:, 0] - pairs.reply_length[:, 1]))
    _, group, group_size = np.unique(pairs.conversation, return_inverse=True, return_counts=True)
    subsets = [(name, pairs.subset == i) for i, name in enumerate(pairs.subsets)]
    if len(subsets) > 1:
        subsets.append(("(all)", np.ones(len(pairs), bool)))
    return [
        {
            "subset": name,
            "n": int(mask.sum()),
            "of shared conversations": float((group_size[group[mask]] > 1).mean()),
            "several human turns": float((pairs.human_turns[mask, 0] > 1).mean()),
            "longer is better": float((longer[mask] > 0).mean()),
            "shorter is better": float((longer[mask] < 0).mean()),
            "accuracy of the longer": float((longer[mask] / 2 + 0.5).mean()),
        }
        for name, mask in subsets
    ]


def length_histogram(lengths: np.ndarray) -> dict:
    """Quantiles of (N,) lengths, and their counts between powers of two."""
    # Edges 0, 32, 64, ... up to the first power of two above the longest length.
    highest_power = max(5, int(lengths.max()).bit_length())
    edges = [0, *(2 ** np.arange(5, highest_power + 1)).tolist()]
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    quantiles = {f"q{q}": int(np.quantile(lengths, q / 100)) for q in (50, 95, 100)}
    return quantiles | {"edges": edges, "counts": counts}
