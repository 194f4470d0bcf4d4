"""Splits off a held-out set, and detects conversations that are in both sets.

The records of one conversation quote each other: a conversation often continues with the reply that was preferred, so
a later record's prompt reveals an earlier record's label. By default whole conversations are therefore held out;
`--validation_split_by order` cuts through them, as the LMFlow recipe does.
"""

from dataclasses import dataclass

import numpy as np

from rm.config import SettingsGroup, setting
from rm.data.examples import Examples
from rm.data.sets import held_out_sets

SPLITS = ("conversation", "order")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(SettingsGroup):
    """Held-out data"""

    eval_dataset_path: tuple[str, ...] = setting(
        (),
        "held-out files to evaluate on, in the same format; as NAME=FILE, sets that are also evaluated by themselves",
        may_change=True,
        hub="data",
    )
    validation_split_percentage: float = setting(0.0, "or hold out this percentage of the training data")
    validation_split_by: str = setting(
        SPLITS[0], "hold out whole conversations, chosen by their hash, or the last records", SPLITS
    )

    def check(self) -> None:
        if self.eval_dataset_path and self.validation_split_percentage:
            raise ValueError("--eval_dataset_path and --validation_split_percentage exclude each other: give only one")
        held_out_sets(self.eval_dataset_path)  # raises where the names of sets make no sense

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_dataset_path or self.validation_split_percentage)


def split(examples: Examples, percentage: float, by: str) -> tuple[Examples, Examples]:
    """(training set, held-out set), both in the order of `examples`."""
    mask = held_out(examples.conversation, percentage, by)
    if not mask.any():
        # A selection of all would copy the arrays that are memory-mapped.
        return examples, examples[:0]
    return examples.select(np.flatnonzero(~mask)), examples.select(np.flatnonzero(mask))


def held_out(conversation: np.ndarray, percentage: float, by: str) -> np.ndarray:
    """(N,) bool: which of N records are held out. It depends on the data alone: the set is the same for every seed.

    Args:
        conversation: (N,) `rm.data.conversation.key` of each record.
        percentage: of the records. Exact by order; by conversation as close as whole conversations allow.
        by: "order" takes the last records. "conversation" takes conversations in the order of their hashes, which is
            as good as random, until they have that many records.

    Raises:
        ValueError: the percentage is not in [0, 100), or no record would be left to train on.
    """
    n = len(conversation)
    # An invalid percentage takes all records, which is the error below.
    n_wanted = n - int((1 - percentage / 100) * n) if 0 <= percentage < 100 else n
    mask = np.arange(n) >= n - n_wanted
    if by == "conversation" and 0 < n_wanted < n:
        # The conversation that the last wanted record belongs to is held out or not, whichever comes closer.
        last = np.sort(conversation)[n_wanted - 1]
        with_last, without_last = conversation <= last, conversation < last
        prefer_without = with_last.all() or n_wanted - without_last.sum() < with_last.sum() - n_wanted
        mask = without_last if prefer_without and without_last.any() else with_last
    if mask.all():
        got = f"got {percentage:g} with {n} examples of {len(np.unique(conversation))} conversations"
        raise ValueError(f"--validation_split_percentage must be 0 or more and leave some to train on; {got}")
    return mask


def leak(train: Examples, held_out: Examples) -> str | None:
    """A warning if conversations of the held-out set are trained on as well; None if none are."""
    n_shared = int(np.isin(held_out.conversation, train.conversation).sum())
    if not n_shared:
        return None
    return (
        f"{n_shared:,} of {len(held_out):,} held-out examples belong to conversations that are trained on as well, "
        "which may reveal their labels (`python -m rm.audit` lists them; --validation_split_by conversation keeps "
        "conversations whole)"
    )
