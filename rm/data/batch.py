"""Examples to micro-batches: which rank computes what in which step, a pure function of (lengths, seed, step, ranks).

A micro-batch is one flat sequence of T tokens, at most `--max_tokens`: examples are packed end to end, and masked from
each other in attention (`rm.model.attention`). There is no (B, T) shape, no padding and no padding token.

A step takes `--global_batch_size` examples in the epoch's shuffled order, packs them into micro-batches, and assigns
these to ranks by cost. Every rank gets the same number of micro-batches, since all ranks have to take part in each
collective; a surplus one is empty. Nothing needs to be replayed on resume: the loader starts at any step.

Shapes: T tokens, L labelled tokens, N examples and R replies in a micro-batch, K replies of the example that has most.
"""

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rm.config import SettingsGroup, require_positive, setting
from rm.data.examples import Example, Examples
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

    def check(self) -> None:
        require_positive(
            num_train_epochs=self.num_train_epochs, global_batch_size=self.global_batch_size, max_steps=self.max_steps
        )


@dataclass(frozen=True)
class MicroBatch:
    """Packed examples. What the host needs stays on the host, so that a step never waits for the device."""

    tokens: Tensor  # (T,) ids
    position: Tensor  # (T,) of each token in its own text: every reply continues the positions of its prompt
    label_positions: Tensor  # (L,) indices into `tokens` whose next token carries loss
    targets: Tensor  # (L,) those next tokens
    reply_end: Tensor  # (R,) index of each reply's last token, where a reward model reads the reward
    reply_table: Tensor  # (N, K) indices into `reply_end` of each example's replies; 0 where it has fewer than K
    grade: Tensor  # (N, K) fp32, as in `rm.data.examples`; nan where an example has fewer than K replies
    label: Tensor  # (N,) fp32
    margin: Tensor  # (N,) fp32
    segments: list[Segment]
    example_indices: np.ndarray  # (N,) into the examples that it was packed from, in order

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on a device; asynchronous where the memory is pinned."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def pack(examples: Examples, indices: Sequence[int], share_prefix: bool = True) -> MicroBatch:
    """Lay the examples with these indices end to end.

    Without indices the micro-batch is empty: one token whose state nothing reads, so that a rank without work still
    runs the same collectives as the others.
    """
    indices = np.asarray(indices, np.int64)
    tokens, segments, label_positions, reply_ends = [], [], [], []
    start = 0  # where the next segment begins in the micro-batch
    for example in (examples[int(i)] for i in indices):
        if len(example.replies) == 1:
            label_positions.append(start + _label_positions(example))
        for prefix, replies in _segments_of(example, share_prefix):
            segment = (len(prefix), *map(len, replies))
            ends = start + len(prefix) + np.cumsum(segment[1:])  # (K,) one behind the last token of each reply
            tokens += [prefix, *replies]
            segments.append(segment)
            reply_ends.append(ends - 1)
            start = ends[-1]
    flat = np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(1, np.int64)
    segments = segments or [(0, 1)]
    labelled = _concatenated(label_positions)
    arrays = dict(
        tokens=flat,
        position=_positions(segments),
        label_positions=labelled,
        targets=flat[labelled + 1],
        reply_end=_concatenated(reply_ends),
        **_preferences(examples, indices),
    )
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    return MicroBatch(**tensors, segments=segments, example_indices=indices)


def _label_positions(example: Example) -> np.ndarray:
    """(L,) positions in a text for SFT whose next token carries loss. The first token has none that predicts it."""
    targets = np.flatnonzero(example.loss[0]) + len(example.prefix)
    return targets[targets > 0] - 1


def _segments_of(example: Example, share_prefix: bool) -> list[tuple[np.ndarray, Sequence[np.ndarray]]]:
    """(prompt, its replies): one segment, or one for each reply where the prompt is not shared."""
    if share_prefix:
        return [(example.prefix, example.replies)]
    return [(example.prefix, [reply]) for reply in example.replies]


def _preferences(examples: Examples, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`reply_table`, `grade`, `label` and `margin` of a micro-batch: examples of any K in rectangular tables."""
    first, counts = examples.reply_offsets[indices], np.diff(examples.reply_offsets)[indices]
    k = np.arange(counts.max(initial=1))
    valid = k < counts[:, None]  # (N, K): whether the example has so many replies
    reply_table = np.where(valid, (np.cumsum(counts) - counts)[:, None] + k, 0)
    grade = np.full(valid.shape, np.nan, np.float32)
    grade[valid] = examples.grade[(first[:, None] + k)[valid]]
    return dict(reply_table=reply_table, grade=grade, label=examples.label[indices], margin=examples.margin[indices])


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


class Loader:
    """The micro-batches of any step. Step s + 1 is packed in a thread while step s computes."""

    def __init__(
        self, examples: Examples, batch: BatchSettings, packing: PackingSettings, seed: int, attention_cost: float
    ):
        """
        Args:
            attention_cost: of one (query, key) pair, in units of one token's cost outside attention.
        """
        self.examples, self.batch, self.packing, self.seed = examples, batch, packing, seed
        self.lengths = _packed_lengths(examples, packing.share_prefix)
        self.costs = self.lengths + attention_cost * _attention_pairs(examples, packing.share_prefix)
        self.labels = _label_counts(examples)
        check_longest_fits(self.lengths, packing.max_tokens)
        self.steps_per_epoch = math.ceil(len(examples) / batch.global_batch_size)
        self.steps = batch.max_steps or math.ceil(batch.num_train_epochs * self.steps_per_epoch)
        self._packer = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, object] | None = None  # (step, future of its StepBatches)
        self._shuffled: tuple[int, np.ndarray] | None = None  # (epoch, order of its examples)

    def at(self, step: int) -> StepBatches:
        """The micro-batches of optimizer step `step` (from 0). Steps may be asked for in any order."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._packer.submit(self._make, step))
        batches = self._next[1].result()
        self._next = (step + 1, self._packer.submit(self._make, step + 1))
        return batches

    def indices(self, step: int) -> np.ndarray:
        """Which examples a step takes, over all ranks: the epoch's shuffle is a function of (seed, epoch) alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        shuffled = self._shuffled  # read once: the packing thread may replace it by the next epoch's
        if shuffled is None or shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            shuffled = self._shuffled = (epoch, order)
        size = self.batch.global_batch_size
        return shuffled[1][within * size : (within + 1) * size]

    def assign_to_ranks(self, step: int) -> list[list[np.ndarray]]:
        """The examples of each micro-batch of each rank: indices[rank][micro_batch]."""
        indices = self.indices(step)
        plan = plan_micro_batches(
            self.lengths[indices], self.costs[indices], self.packing.max_tokens, dist.world_size()
        )
        return [[indices[micro_batch] for micro_batch in micro_batches] for micro_batches in plan]

    def step_batches(self, step: int, assigned: list[np.ndarray]) -> StepBatches:
        """What the rank with these micro-batches computes in a step."""
        indices = self.indices(step)
        # Dropout differs between ranks and steps, and repeats on resume.
        (seed,) = np.random.SeedSequence([self.seed, step, dist.rank()]).generate_state(1).tolist()
        return StepBatches(
            micro_batches=[pack(self.examples, one, self.packing.share_prefix) for one in assigned],
            num_examples=len(indices),
            num_labels=int(self.labels[indices].sum()),
            num_tokens=int(self.lengths[indices].sum()),
            seed=seed,
        )

    def _make(self, step: int) -> StepBatches:
        return self.step_batches(step, self.assign_to_ranks(step)[dist.rank()])


class EvalBatches:
    """This rank's micro-batches of one pass over all examples, each packed when it is needed."""

    def __init__(self, examples: Examples, packing: PackingSettings):
        lengths = _packed_lengths(examples, packing.share_prefix)
        check_longest_fits(lengths, packing.max_tokens)
        self.examples, self.share_prefix = examples, packing.share_prefix
        plan = plan_micro_batches(lengths, lengths, packing.max_tokens, dist.world_size())
        self.assigned = plan[dist.rank()] if len(examples) else []

    def __len__(self) -> int:
        return len(self.assigned)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (pack(self.examples, indices, self.share_prefix) for indices in self.assigned)


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
    fits = len(examples) and _packed_lengths(examples, packing.share_prefix).max() <= packing.max_tokens
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


def plan_micro_batches(
    lengths: np.ndarray, costs: np.ndarray, max_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """Assign examples to ranks and micro-batches: plan[rank][micro_batch] is a list of indices into `lengths`.

    As few micro-batches as hold the tokens, rounded up to the same number on every rank, and filled evenly by cost.
    Only where even filling would overflow one are they packed tight (best fit) instead.

    Args:
        lengths: (n,) tokens of each example, none over max_tokens.
        costs: (n,) what each costs to compute, in any unit.
    """
    by_cost = np.argsort(-costs, kind="stable").tolist()
    length_of, cost_of = lengths.tolist(), costs.tolist()
    needed = max(1, math.ceil(sum(length_of) / max_tokens))
    packed = _fill_evenly(by_cost, length_of, cost_of, max_tokens, math.ceil(needed / world_size) * world_size)
    if packed is None:
        packed = _best_fit_decreasing(sorted(by_cost, key=lambda i: -length_of[i]), length_of, max_tokens)
        packed += [[] for _ in range(-len(packed) % world_size)]  # empty ones: the same number on every rank
    heaviest_first = sorted(packed, key=lambda indices: -sum(cost_of[i] for i in indices))
    # In round i the ranks take one micro-batch each, in rank order and then, in the next round, in reverse (a "snake"),
    # so that no rank gets the heaviest of every round.
    plan = [[] for _ in range(world_size)]
    for i in range(0, len(heaviest_first), world_size):
        this_round = heaviest_first[i : i + world_size]
        if (i // world_size) % 2:
            this_round = this_round[::-1]
        for rank, micro_batch in enumerate(this_round):
            plan[rank].append(micro_batch)
    return plan


def _fill_evenly(
    order: list[int], length_of: list[int], cost_of: list[float], max_tokens: int, count: int
) -> list[list[int]] | None:
    """`count` micro-batches: costliest example first, each to the cheapest so far (LPT); None if one overflows."""
    packed, used = [[] for _ in range(count)], [0] * count
    cheapest = [(0.0, n) for n in range(count)]  # a heap of (cost so far, micro-batch)
    for i in order:
        cost, n = cheapest[0]
        used[n] += length_of[i]
        if used[n] > max_tokens:
            return None
        packed[n].append(i)
        heapq.heapreplace(cheapest, (cost + cost_of[i], n))
    return packed


def _best_fit_decreasing(order: list[int], length_of: list[int], max_tokens: int) -> list[list[int]]:
    """Each example into the fullest micro-batch that still has room for it. `order` is longest first.

    The rooms that occur are kept as the bits of one integer, so that the smallest room of at least `size` is its lowest
    bit from `size` up: a million examples take a second.
    """
    packed, with_room = [], defaultdict(list)  # with_room[r]: micro-batches with room for r more tokens
    rooms = 0  # bit r is set where with_room[r] is not empty
    for i in order:
        size = length_of[i]
        fitting = rooms >> size
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            room = size + lowest_bit
            micro_batch = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, micro_batch = max_tokens, []
            packed.append(micro_batch)
        micro_batch.append(i)
        with_room[room - size].append(micro_batch)
        rooms |= 1 << (room - size)
    return packed


def check_longest_fits(lengths: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError where a micro-batch cannot hold the longest example."""
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(
            f"--max_tokens {max_tokens} is less than the longest example's {lengths.max()} tokens: "
            f"raise it to at least {lengths.max()}, or lower --max_length"
        )


def _packed_lengths(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(n,) tokens that each example takes in a micro-batch."""
    if share_prefix:
        return examples.lengths
    return examples.lengths + (np.diff(examples.reply_offsets) - 1) * examples.prefix_lengths


def _attention_pairs(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(n,) the number of (query, key) pairs in each example's attention."""
    replies, prefix = examples.reply_lengths.astype(np.int64), examples.prefix_lengths.astype(np.int64)
    replies_per_example = np.diff(examples.reply_offsets)
    # A reply of R tokens behind a prompt of P: R (R + 1) / 2 pairs within it, and R P with the prompt.
    of_replies = replies * (replies + 1) // 2 + replies * np.repeat(prefix, replies_per_example)
    copies = 1 if share_prefix else replies_per_example
    return np.add.reduceat(of_replies, examples.reply_offsets[:-1]) + copies * prefix * (prefix + 1) // 2


def _label_counts(examples: Examples) -> np.ndarray:
    """(n,) labelled tokens of each example; a text's first token has none that predicts it."""
    loss, first, last = examples.loss, examples.starts, examples.starts + examples.lengths - 1
    # reduceat sums from each index to the next. Of first, last, first, last, ... the even sums are over [first, last)
    # of one example, the odd ones over what lies between two examples.
    sums = np.add.reduceat(loss, np.stack([first, last], axis=1).ravel(), dtype=np.int64)
    before_last = sums[::2]
    return np.where(examples.lengths > 1, before_last + loss[last] - loss[first], 0)
