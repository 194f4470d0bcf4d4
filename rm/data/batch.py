"""Examples to micro-batches: which rank computes what in which step, a pure function of (lengths, seed, step, ranks).

A micro-batch is one flat sequence of T tokens, at most `--max_tokens`: examples are packed end to end, and masked from
each other in attention (`rm.model.attention`). There is no (B, T) shape, no padding and no padding token.

A step takes `--global_batch_size` examples in the epoch's shuffled order, or those of whole prompts until it has enough
(`rm.data.groups`), packs them into micro-batches, and assigns these to ranks by cost. Every rank gets the same number
of micro-batches, since all ranks have to take part in each collective; a surplus one is empty. Nothing needs to be
replayed on resume: the loader starts at any step.

Shapes: T tokens, L labelled tokens, N examples and R replies in a micro-batch, K replies of the example that has most,
A attributes that are learned.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rm.config import SettingsGroup, require_positive, setting
from rm.data.examples import Example, Examples
from rm.data.groups import Groups, Part, alone, by_prompt, packed_lengths, part_of
from rm.data.micro_batches import plan_micro_batches
from rm.distributed import process_group as dist

Segment = tuple[int, ...]  # (P, R1, ..., RK): the length of a prompt, then of each of its replies


@dataclass(frozen=True, kw_only=True)
class PackingSettings(SettingsGroup):
    """Micro-batches: bounds on memory that do not change the result"""

    max_tokens: int = setting(4096, "tokens per process and micro-batch", may_change=True)
    share_prefix: bool = setting(True, "compute the prompt that the replies of a pair share once", may_change=True)

    def check(self) -> None:
        require_positive(max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class BatchSettings(SettingsGroup):
    """Batches"""

    num_train_epochs: float = setting(1.0, "passes over the training examples")
    max_steps: int | None = setting(None, "stop after this many optimizer steps, whatever the epochs")
    global_batch_size: int = setting(64, "examples (or pairs) per optimizer step, over all processes")

    group_by_prompt: ClassVar[bool] = False

    def check(self) -> None:
        require_positive(
            num_train_epochs=self.num_train_epochs, global_batch_size=self.global_batch_size, max_steps=self.max_steps
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceBatchSettings(BatchSettings):
    """Batches"""

    group_by_prompt: bool = setting(
        False,
        "compute the pairs of one prompt together, each distinct reply once; a step takes the pairs of whole prompts "
        "until it has --global_batch_size or more",
    )


@dataclass(frozen=True)
class MicroBatch:
    """Packed examples. What the host needs stays on the host, so that a step never waits for the device."""

    tokens: Tensor  # (T,) ids
    position: Tensor  # (T,) of each token in its own text: every reply continues the positions of its prompt
    label_positions: Tensor  # (L,) indices into `tokens` whose next token carries loss
    targets: Tensor  # (L,) those next tokens
    label_weights: Tensor | None  # (L,) fp32 factors of their losses; None: all are 1
    reply_end: Tensor  # (R,) index of each reply's last token, where a reward model reads the reward
    reply_table: Tensor  # (N, K) indices into `reply_end` of each example's replies; 0 where it has fewer than K
    grade: Tensor  # (N, K) fp32, as in `rm.data.examples`; nan where an example has fewer than K replies
    label: Tensor  # (N,) fp32
    margin: Tensor  # (N,) fp32
    weight: Tensor  # (N,) fp32
    strength: Tensor  # (N,) fp32
    attributes: Tensor  # (N, A) fp32: of each example's one reply, nan where unknown; A is 0 where replies are compared
    segments: list[Segment]
    example_indices: np.ndarray  # (N,) into the examples that it was packed from, in order

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on a device; asynchronous where the memory is pinned."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def pack(
    examples: Examples,
    indices: Sequence[int],
    share_prefix: bool = True,
    groups: Groups | None = None,
    label_chosen: bool = False,
) -> MicroBatch:
    """Lay the examples with these indices end to end.

    Without indices the micro-batch is empty: one token whose state nothing reads, so that a rank without work still
    runs the same collectives as the others.

    Args:
        groups: the indices are those of parts of these, each of which has several examples.
        label_chosen: chosen replies carry SFT loss.
    """
    of_parts = [[i] if groups is None else groups.members_of(i) for i in indices]
    tokens, segments, reply_ends, compared, labels = [], [], [], [], []
    start = n_replies = 0  # where the next segment begins in the micro-batch, and the number of replies before it
    for members in of_parts:
        part = part_of(examples, members, label_chosen)
        compared += [n_replies + own for own in part.compared]  # examples of one part may share replies
        n_replies += len(part.replies)
        for prefix, replies, loss in _segments_of(part, share_prefix):
            segment = (len(prefix), *map(len, replies))
            ends = start + len(prefix) + np.cumsum(segment[1:])  # (K,) one behind the last token of each reply
            tokens += [prefix, *replies]
            segments.append(segment)
            reply_ends.append(ends - 1)
            labels += [_labels(start, len(prefix), end, of_reply) for end, of_reply in zip(ends, loss, strict=False)]
            start = ends[-1]
    flat = np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(1, np.int64)
    segments = segments or [(0, 1)]
    label_positions, targets, label_weights = map(_concatenated, zip(*labels, strict=True) if labels else ([], [], []))
    members = _concatenated(of_parts).astype(np.int64)
    arrays = dict(
        tokens=flat,
        position=_positions(segments),
        label_positions=label_positions,
        targets=flat[targets],
        reply_end=_concatenated(reply_ends),
        attributes=examples.attributes[members],
        **preference_tables(examples, members, compared),
    )
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    weights = _tensor(label_weights.astype(np.float32)) if label_chosen else None
    return MicroBatch(**tensors, label_weights=weights, segments=segments, example_indices=members)


def _segments_of(part: Part, share_prefix: bool) -> list[tuple[np.ndarray, Sequence[np.ndarray], Sequence[np.ndarray]]]:
    """(prompt, replies, their loss): one segment, or one for each reply where the prompt is not shared."""
    loss = part.loss or []
    if share_prefix or len(part.replies) == 1:
        return [(part.prefix, part.replies, loss)]
    return [(part.prefix, part.replies[i : i + 1], loss[i : i + 1]) for i in range(len(part.replies))]


def _labels(start: int, prefix: int, end: int, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, those of their targets, weights) of the tokens of a reply that carry loss.

    Args:
        start: where the segment begins, whose prompt has `prefix` tokens.
        end: one behind the last token of the reply.
    """
    (labelled,) = np.nonzero(loss)
    if not prefix:
        labelled = labelled[labelled > 0]  # nothing predicts the first token of a text
    targets = end - len(loss) + labelled
    positions = np.where(labelled > 0, targets - 1, start + prefix - 1)
    return positions, targets, loss[labelled]


def preference_tables(examples: Examples, indices: np.ndarray, compared: list[np.ndarray]) -> dict[str, np.ndarray]:
    """`reply_table` and the labels of a micro-batch: examples of any K in rectangular tables.

    Args:
        compared: of each example, which of the replies are its own.
    """
    first, counts = examples.reply_offsets[indices], np.diff(examples.reply_offsets)[indices]
    k = np.arange(counts.max(initial=1))
    valid = k < counts[:, None]  # (N, K): whether the example has so many replies
    reply_table = np.zeros(valid.shape, np.int64)
    reply_table[valid] = _concatenated(compared)
    grade = np.full(valid.shape, np.nan, np.float32)
    grade[valid] = examples.grade[(first[:, None] + k)[valid]]
    of_example = {name: getattr(examples, name)[indices] for name in ("label", "margin", "weight", "strength")}
    return dict(reply_table=reply_table, grade=grade, **of_example)


def _positions(segments: list[Segment]) -> np.ndarray:
    """(T,): a prompt's positions count from 0, those of every reply from the prompt's end."""
    positions = []
    for prefix, *replies in segments:
        positions.append(np.arange(prefix))
        positions += [np.arange(prefix, prefix + reply) for reply in replies]
    return np.concatenate(positions)


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _tensor(x: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


@dataclass(frozen=True)
class StepBatches:
    """What one optimizer step computes: this rank's micro-batches, and the counts over all ranks."""

    micro_batches: list[MicroBatch]  # of this rank; the same number on every rank
    num_examples: int  # over all ranks: what a reward model's loss is divided by
    num_labels: int  # labelled tokens over all ranks: what a language model's loss is divided by
    num_tokens: int  # computed, over all ranks
    seed: int  # of this rank's dropout in this step
    num_prompts: int | None = None  # over all ranks, where the pairs of one prompt are computed together


class Loader:
    """The micro-batches of any step. Step s + 1 is packed in a thread while step s computes."""

    def __init__(
        self,
        examples: Examples,
        batch: BatchSettings,
        packing: PackingSettings,
        seed: int,
        attention_cost: float,
        label_chosen: bool = False,
    ):
        """
        Args:
            attention_cost: of one (query, key) pair, in units of one token's cost outside attention.
            label_chosen: chosen replies carry SFT loss.
        """
        self.examples, self.batch, self.packing, self.seed = examples, batch, packing, seed
        self.label_chosen = label_chosen
        if batch.group_by_prompt:
            self.groups = by_prompt(examples, packing.share_prefix, packing.max_tokens, label_chosen)
        else:
            self.groups = alone(examples, packing.share_prefix, label_chosen)
        # Of each part of a group, which without --group_by_prompt is an example
        self.lengths, self.labels = self.groups.lengths, self.groups.labels
        self.costs = self.lengths + attention_cost * self.groups.attention_pairs
        check_longest_fits(self.lengths, packing.max_tokens)
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}  # see `_shuffled`
        self._steps_of: dict[int, int] = {}
        self.steps_per_epoch = self.steps_of(0)
        self.steps = batch.max_steps or self._steps_of_epochs(batch.num_train_epochs)
        self._packer = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, object] | None = None  # (step, future of its StepBatches)

    def at(self, step: int) -> StepBatches:
        """The micro-batches of optimizer step `step` (from 0). Steps may be asked for in any order."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._packer.submit(self._make, step))
        batches = self._next[1].result()
        self._next = (step + 1, self._packer.submit(self._make, step + 1))
        return batches

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch. Where a step takes whole prompts, it depends on the order how many there are."""
        if not self.batch.group_by_prompt:
            return math.ceil(len(self.examples) / self.batch.global_batch_size)
        if epoch not in self._steps_of:  # every step asks for all epochs before its own
            self._steps_of[epoch] = len(self._epoch(epoch)[1]) - 1
        return self._steps_of[epoch]

    def _steps_of_epochs(self, epochs: float) -> int:
        part = round(epochs % 1 * self.steps_of(int(epochs)), 6)  # 1.1 epochs of 10 steps are 11, not 12
        return sum(map(self.steps_of, range(int(epochs)))) + math.ceil(part)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        if epoch not in self._epochs:
            # The packing thread may be in the next epoch before the training is: the last two are kept.
            kept = list(self._epochs.items())[-1:]
            self._epochs = dict(kept) | {epoch: self._shuffled(epoch)}
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """An epoch's order of groups, a function of (seed, epoch) alone, and where in it each step begins and ends."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        taken = np.append(0, np.cumsum(self.groups.sizes[order]))  # examples of the first 0, 1, ... groups
        starts = [0]
        while starts[-1] < len(order):
            enough = np.searchsorted(taken, taken[starts[-1]] + self.batch.global_batch_size)
            starts.append(min(int(enough), len(order)))
        return order, starts

    def _groups_of(self, step: int) -> np.ndarray:
        """The groups that a step takes, over all ranks."""
        epoch = 0
        while step >= self.steps_of(epoch):
            step, epoch = step - self.steps_of(epoch), epoch + 1
        order, starts = self._epoch(epoch)
        return order[starts[step] : starts[step + 1]]

    def indices(self, step: int) -> np.ndarray:
        """The parts of groups (`rm.data.groups`; else: the examples) that a step takes, over all ranks."""
        return self.groups.parts_of(self._groups_of(step))

    def assign_to_ranks(self, step: int) -> list[list[np.ndarray]]:
        """`indices` of each micro-batch of each rank: indices[rank][micro_batch]."""
        indices = self.indices(step)
        plan = plan_micro_batches(
            self.lengths[indices], self.costs[indices], self.packing.max_tokens, dist.world_size()
        )
        return [[indices[micro_batch] for micro_batch in micro_batches] for micro_batches in plan]

    def step_batches(self, step: int, assigned: list[np.ndarray]) -> StepBatches:
        """What the rank with these micro-batches computes in a step."""
        groups, indices = self._groups_of(step), self.indices(step)
        # Dropout differs between ranks and steps, and repeats on resume.
        (seed,) = np.random.SeedSequence([self.seed, step, dist.rank()]).generate_state(1).tolist()
        return StepBatches(
            micro_batches=[
                pack(self.examples, one, self.packing.share_prefix, self.groups, self.label_chosen) for one in assigned
            ],
            num_examples=int(self.groups.sizes[groups].sum()),
            num_labels=int(self.labels[indices].sum()),
            num_tokens=int(self.lengths[indices].sum()),
            seed=seed,
            num_prompts=len(groups) if self.batch.group_by_prompt else None,
        )

    def _make(self, step: int) -> StepBatches:
        return self.step_batches(step, self.assign_to_ranks(step)[dist.rank()])


class EvalBatches:
    """This rank's micro-batches of one pass over all examples, each packed when it is needed."""

    def __init__(self, examples: Examples, packing: PackingSettings):
        lengths = packed_lengths(examples, packing.share_prefix)
        check_longest_fits(lengths, packing.max_tokens)
        self.examples, self.packing = examples, packing
        plan = plan_micro_batches(lengths, lengths, packing.max_tokens, dist.world_size())
        self.assigned = plan[dist.rank()] if len(examples) else []

    def __len__(self) -> int:
        return len(self.assigned)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (pack(self.examples, indices, self.packing.share_prefix) for indices in self.assigned)

    def distinct(self) -> tuple["EvalBatches", np.ndarray]:
        """(micro-batches in which each text stands once, (R,) the place of each reply's text in them)."""
        texts, place = self._texts
        return self if texts is self.examples else EvalBatches(texts, self.packing), place

    @cached_property
    def _texts(self) -> tuple[Examples, np.ndarray]:
        return new_texts(self.examples, self.packing, {})


def new_texts(examples: Examples, packing: PackingSettings, seen: dict[bytes, int]) -> tuple[Examples, np.ndarray]:
    """What has to be computed for the reward of every text: each distinct text once, in examples that fit.

    An example of more than --max_tokens becomes several, each with the prefix and some of the replies, at least one.
    If all texts are new and all examples fit, no token is copied.

    Args:
        seen: the texts of earlier calls, to which the new ones are added: a hash -> the text's index among all of them.

    Returns:
        (examples whose replies are the new texts, (R,) index of each reply's text)
    """
    before, index, is_new = len(seen), [], []
    for example in examples:
        prefix = hashlib.blake2b(example.prefix, digest_size=16)
        for reply in example.replies:
            text = prefix.copy()
            text.update(reply)
            is_new.append(text.digest() not in seen)
            index.append(seen.setdefault(text.digest(), len(seen)))
    fits = len(examples) and packed_lengths(examples, packing.share_prefix).max() <= packing.max_tokens
    if not (fits and all(is_new)):
        examples = Examples.build(_parts(examples, packing, np.array(is_new, bool)))
    assert len(examples.reply_lengths) == len(seen) - before
    return examples, np.array(index, np.int64)


def _parts(examples: Examples, packing: PackingSettings, kept: np.ndarray) -> Iterator[Example]:
    """Examples of at most --max_tokens, where one text has no more, with the replies that are `kept`, in order.

    Args:
        kept: (R,) mask.
    """
    for example, first in zip(examples, examples.reply_offsets, strict=False):
        prefix = len(example.prefix)
        once, each = (prefix, 0) if packing.share_prefix else (0, prefix)
        part, total = [], once
        for i in np.flatnonzero(kept[first : first + len(example.replies)]):
            tokens = each + len(example.replies[i])
            if part and total + tokens > packing.max_tokens:
                yield _with_replies(example, part)
                part, total = [], once
            part.append(i)
            total += tokens
        if part:
            yield _with_replies(example, part)


def _with_replies(example: Example, indices: list[int]) -> Example:
    replies, loss = (tuple(of[i] for i in indices) for of in (example.replies, example.loss))
    return replace(example, replies=replies, loss=loss, grade=example.grade[indices])


def check_longest_fits(lengths: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError where a micro-batch cannot hold the longest example."""
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(
            f"--max_tokens {max_tokens} is less than the longest example's {lengths.max()} tokens: "
            f"raise it to at least {lengths.max()}, or lower --max_length"
        )
