"""What may be wrong with preference data: each check counts the pairs that it concerns and names some of them.

An *error* makes an evaluation worthless for the pairs concerned, a *warning* makes a label useless or suspicious.
`docs/audit.md` says what to do about each.

Shapes: N pairs.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from rm.audit.index import Pairs, Texts

NAMED = 5  # places that a finding names


@dataclass(frozen=True)
class Finding:
    name: str
    severity: str  # "error" or "warning"
    about: str
    count: int  # pairs concerned
    share: float  # of all pairs looked at
    where: list[str]  # the places of the first few

    @classmethod
    def of(cls, name: str, severity: str, about: str, mask: np.ndarray, pairs: Pairs, place=None) -> "Finding":
        """The pairs for which `mask`, (N,) bool, is true. `place` names the i-th pair's, if not `pairs.where[i]`."""
        first = np.flatnonzero(mask)[:NAMED]
        where = [place(i) if place else pairs.where[i] for i in first]
        return cls(name, severity, about, int(mask.sum()), float(mask.mean()) if len(mask) else 0.0, where)


def within(pairs: Pairs) -> list[Finding]:
    """The checks of one set of pairs."""
    same = pairs.whole[:, 0] == pairs.whole[:, 1]
    ordered, reversed = _together(pairs.whole), _together(pairs.whole[:, ::-1])
    first = np.zeros(len(pairs), bool)
    first[np.unique(ordered, return_index=True)[1]] = True
    checks = {
        "identical": (same, "both sides are the same text"),
        "swapped": (np.isin(ordered, reversed) & ~same, "another pair has the same two texts the other way round"),
        "duplicated": (~first, "an earlier pair is the same"),
        "prompts differ": (pairs.prompt[:, 0] != pairs.prompt[:, 1], "the two sides differ before their last turn"),
        "no reply": (~pairs.answered.all(1), "a side ends in a blank reply, or in no turn of the assistant's"),
        "no turns": ((pairs.human_turns == 0).any(1), "no human turn was found in a side: unknown marks?"),
    }
    found = [Finding.of(name, "warning", about, mask, pairs) for name, (mask, about) in checks.items()]
    return [_given_away("label revealed", "warning", "goes on in another pair, whose prompt", pairs, pairs), *found]


def against_training(held_out: Pairs, train: Pairs) -> list[Finding]:
    """What training pairs say of pairs held out."""
    again = np.isin(_together(np.sort(held_out.whole)), _together(np.sort(train.whole)))
    return [
        Finding.of("pair in training", "error", "the same two texts are a training pair", again, held_out),
        _given_away("label in training", "error", "goes on in a training pair, whose prompt", held_out, train),
        _shared("conversation in training", "a training pair", held_out, train),
    ]


def against_sft(held_out: Pairs, texts: Texts) -> list[Finding]:
    """What SFT texts say of pairs held out."""
    return [
        _given_away("label in SFT", "error", "is imitated by an SFT text, which", held_out, texts),
        _shared("conversation in SFT", "an SFT text", held_out, texts),
    ]


def _given_away(name: str, severity: str, how: str, pairs: Pairs, others: Texts) -> Finding:
    """Pairs of which exactly one side is quoted by others."""
    quoted = others.quotes.count(pairs.whole) > (pairs.inside if others is pairs else 0)  # a pair may quote itself
    alone = quoted & ~quoted[:, ::-1]

    def place(i: int) -> str:
        (side,) = np.flatnonzero(alone[i])
        owners = others.quotes.owners(pairs.whole[i, side])
        other = next(owner for owner in owners if others is not pairs or owner != i)
        return f"{pairs.where[i]} (in {others.where[other]})"

    better, worse = alone.sum(0)
    about = f"one of the two replies {how} gives the label away (of {better:,} the better one, of {worse:,} the worse)"
    return Finding.of(name, severity, about, alone.any(1), pairs, place)


def _shared(name: str, by: str, held_out: Pairs, others: Texts) -> Finding:
    mask = np.isin(held_out.conversation, others.conversation)
    return Finding.of(name, "warning", f"{by} has the same first human turn", mask, held_out)


def _together(hashes: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N,): one hash of two, in this order."""
    return hashes[:, 0] * np.int64(0x9E3779B97F4A7C15 - 2**64) + hashes[:, 1]


def subsets(pairs: Pairs) -> list[dict]:
    """Of each subset its size, its depth, and how far one gets by preferring the longer reply."""
    longer = np.sign(pairs.reply_length[:, 0] - pairs.reply_length[:, 1])
    _, group, size = np.unique(pairs.conversation, return_inverse=True, return_counts=True)
    groups = ((name, pairs.subset == i) for i, name in enumerate(pairs.subsets))
    everyone = [("(all)", np.ones(len(pairs), bool))] if len(pairs.subsets) > 1 else []
    return [
        {
            "subset": name,
            "n": int(mine.sum()),
            "of shared conversations": float((size[group[mine]] > 1).mean()),
            "several human turns": float((pairs.human_turns[mine, 0] > 1).mean()),
            "longer is better": float((longer[mine] > 0).mean()),
            "shorter is better": float((longer[mine] < 0).mean()),
            "accuracy of the longer": float((longer[mine] / 2 + 0.5).mean()),
        }
        for name, mine in itertools.chain(groups, everyone)
    ]


def histogram(lengths: np.ndarray) -> dict:
    """Of (N,) lengths: quantiles, and counts between powers of two."""
    edges = [0, *(2 ** np.arange(5, max(6, int(lengths.max()).bit_length() + 1))).tolist()]
    counts = np.histogram(lengths, bins=[*edges[:-1], edges[-1] + 1])[0].tolist()
    return {f"q{q}": int(np.quantile(lengths, q / 100)) for q in (50, 95, 100)} | {"edges": edges, "counts": counts}
