"""What is held out of the training data, and whether it is held out indeed.

The records of one conversation quote each other: the reply that people preferred is often the one with which the
conversation went on, so that a later record's prompt gives away an earlier record's label. Whole conversations are
therefore held out by default; `--validation_split_by order` cuts through them, as the recipe does.
"""

from dataclasses import dataclass

import numpy as np

from rm.config import setting
from rm.data.examples import Examples

SPLITS = ("conversation", "order")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Held-out data"""

    eval_dataset_path: tuple[str, ...] = setting((), "files to evaluate on, in the same format", may_change=True)
    validation_split_percentage: float = setting(0.0, "or hold out this part of the data, in percent")
    validation_split_by: str = setting(
        SPLITS[0], "hold out whole conversations, drawn by their hash, or the last records", SPLITS
    )

    def check(self) -> None:
        if self.eval_dataset_path and self.validation_split_percentage:
            raise ValueError("--eval_dataset_path and --validation_split_percentage exclude each other: give one")


def split(examples: Examples, percentage: float, by: str) -> tuple[Examples, Examples]:
    """(to train on, held out), both in the order of `examples`."""
    mask = held_out(examples.conversation, percentage, by)
    if not mask.any():  # nothing but arrays mapped from disk, then
        return examples, examples[:0]
    return examples.select(np.flatnonzero(~mask)), examples.select(np.flatnonzero(mask))


def held_out(conversation: np.ndarray, percentage: float, by: str) -> np.ndarray:
    """(N,) bool: which of N records are held out. A function of the data alone: all seeds have the same test.

    Args:
        conversation: (N,) of each record, by `rm.data.conversation.key`.
        percentage: of the records; exactly by order; by conversation as near as whole ones come.
        by: "order" takes the last records; "conversation" takes conversations in the order of their hashes, which is
            a random one, until they hold as many.
    """
    n = len(conversation)
    wanted = n - int((1 - percentage / 100) * n) if 0 <= percentage < 100 else n
    mask = np.arange(n) >= n - wanted
    if by == "conversation" and 0 < wanted < n:
        last = np.sort(conversation)[wanted - 1]
        whole, less = conversation <= last, conversation < last
        nearer = whole.all() or wanted - less.sum() < whole.sum() - wanted
        mask = less if nearer and less.any() else whole
    if mask.all():
        got = f"got {percentage:g} with {n} examples of {len(np.unique(conversation))} conversations"
        raise ValueError(f"--validation_split_percentage must be 0 or more and leave some to train on; {got}")
    return mask


def leak(train: Examples, held_out: Examples) -> str | None:
    """What makes the held-out data a bad judge of this training, in one line; None if nothing does."""
    shared = int(np.isin(held_out.conversation, train.conversation).sum())
    if not shared:
        return None
    return (
        f"{shared:,} of {len(held_out):,} held-out examples are of conversations that are trained on as well, and may "
        f"be given away there (`python -m rm.audit` finds which; --validation_split_by conversation cuts through none)"
    )
