"""Examples to rows: who computes what in which step, a pure function of (lengths, seed, step, world).

A row is a micro-batch: one flat run of T tokens, at most `--max_tokens`, of documents laid end to end
(`rm.model.attention`). There is no (B, T), no padding, no attention mask and no pad token, so the field's most
common reward-model bug cannot be written here.

A step takes `--global_batch_size` examples in the epoch's shuffled order, packs them into rows best fit
first, and deals the rows to the ranks by cost. Every rank gets the same number of rows, since all ranks must
meet in each collective; a spare row is empty. Nothing needs to be replayed on resume: the loader starts at
any step.

Shapes: T tokens in a row, L labelled tokens, N examples and R replies in a row, K replies of the example that has most.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rm.config import require_positive, setting
from rm.data.examples import Examples
from rm.distributed import process_group as dist

Segment = tuple[int, ...]  # (P, R1, ..., RK): prefix length, then the reply lengths


@dataclass(frozen=True, kw_only=True)
class PackingSettings:
    """Rows: bounds on memory that do not change the mathematics"""

    max_tokens: int = setting(4096, "tokens per process and micro-batch", may_change=True)
    share_prefix: bool = setting(True, "compute what the replies of a pair have in common once", may_change=True)

    def check(self) -> None:
        require_positive(self, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Batches"""

    num_train_epochs: float = setting(1.0, "passes over the training examples")
    max_steps: int | None = setting(None, "stop after this many optimizer steps, whatever the epochs")
    global_batch_size: int = setting(64, "examples (or pairs) per optimizer step, over all processes")

    def check(self) -> None:
        for name in ("num_train_epochs", "global_batch_size"):
            require_positive(self, name)
        if self.max_steps is not None:
            require_positive(self, "max_steps")


@dataclass(frozen=True)
class MicroBatch:
    """One row. Indices and lengths that the host needs stay on the host, so that a step never waits for the device."""

    tokens: Tensor  # (T,) ids
    position: Tensor  # (T,) place in its own text: every reply continues its prefix's count
    label_positions: Tensor  # (L,) where a next token carries loss
    targets: Tensor  # (L,) those next tokens
    last: Tensor  # (R,) each reply's final token, replies in order: what a reward model reads
    replies: Tensor  # (N, K) where in `last` each example's replies are; 0 where it has fewer than K
    grade: Tensor  # (N, K) fp32, as `rm.data.examples` has it; nan where it has fewer than K
    label: Tensor  # (N,) fp32
    margin: Tensor  # (N,) fp32
    segments: list[Segment]
    examples: np.ndarray  # numbers of the examples in this row, in order

    def to(self, device: torch.device) -> "MicroBatch":
        """The row on a device; asynchronous where the memory is pinned."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def pack(examples: Examples, numbers: np.ndarray, share_prefix: bool = True) -> MicroBatch:
    """Lay the examples with these numbers end to end. No numbers: an empty row, one token that nobody reads."""
    tokens, segments, label_positions, last = [], [], [], []
    start = 0
    for example in (examples[int(n)] for n in numbers):
        if len(example.replies) == 1:  # a text: each token is predicted by the one before, the first by nothing
            carries = np.flatnonzero(example.loss[0]) + len(example.prefix)
            label_positions.append(start - 1 + carries[carries > 0])
        if share_prefix:
            paths = [(example.prefix, example.replies)]
        else:
            paths = [(example.prefix, (reply,)) for reply in example.replies]
        for prefix, replies in paths:
            tokens += [prefix, *replies]
            segments.append((len(prefix), *map(len, replies)))
            ends = start + len(prefix) + np.cumsum(segments[-1][1:])
            last.append(ends - 1)
            start = ends[-1]
    flat = np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(1, np.int64)
    where, ends = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (label_positions, last))
    segments = segments or [(0, 1)]
    made = (flat, _positions(segments), where, flat[where + 1], ends, *_preferences(examples, numbers))
    return MicroBatch(*map(_tensor, made), segments=segments, examples=np.asarray(numbers))


def _preferences(examples: Examples, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """`replies`, `grade`, `label` and `margin` of a row: tables, so that examples of any K are computed at once."""
    first, counts = examples.reply_offsets[numbers], np.diff(examples.reply_offsets)[numbers]
    place = np.arange(counts.max(initial=1))
    there = place < counts[:, None]  # (N, K)
    replies = np.where(there, (np.cumsum(counts) - counts)[:, None] + place, 0)
    grade = np.full(there.shape, np.nan, np.float32)
    grade[there] = examples.grade[(first[:, None] + place)[there]]
    return replies, grade, examples.label[numbers], examples.margin[numbers]


def _positions(segments: list[Segment]) -> np.ndarray:
    """(T,): a prefix counts from 0, every reply from the prefix's end."""
    counts = [np.arange(offset, offset + n) for prefix, *replies in segments
              for offset, n in ((0, prefix), *((prefix, reply) for reply in replies))]  # fmt: skip
    return np.concatenate(counts)


def _tensor(x: np.ndarray) -> Tensor:
    made = torch.from_numpy(np.ascontiguousarray(x))
    return made.pin_memory() if torch.cuda.is_available() else made


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step, as this rank sees it."""

    rows: list[MicroBatch]  # this rank's micro-batches; as many on every rank
    examples: int  # over all ranks and rows: a reward model's divisor
    labels: int  # labelled tokens over all ranks and rows: a language model's divisor
    tokens: int  # over all ranks and rows, as computed
    seed: int  # of this rank's dropout in this step


class Loader:
    """Work for any step. Step s+1 is packed in a thread while step s computes."""

    def __init__(self, examples: Examples, settings, seed: int, attention_cost: float):
        """
        Args:
            settings: BatchSettings and RowSettings.
            attention_cost: what one (query, key) pair costs, in units of one token's cost outside attention.
        """
        self.examples, self.settings, self.seed = examples, settings, seed
        self.lengths = _lengths(examples, settings.share_prefix)
        self.costs = self.lengths + attention_cost * _attention_pairs(examples, settings.share_prefix)
        self.labels = _labels(examples)
        check_longest_fits(self.lengths, settings.max_tokens)
        self.steps_per_epoch = math.ceil(len(examples) / settings.global_batch_size)
        self.steps = settings.max_steps or math.ceil(settings.num_train_epochs * self.steps_per_epoch)
        self._packer = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, object] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def at(self, step: int) -> StepBatches:
        """The work of optimizer step `step` (from 0), whatever was asked before."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._packer.submit(self._make, step))
        work = self._ahead[1].result()
        self._ahead = (step + 1, self._packer.submit(self._make, step + 1))
        return work

    def numbers(self, step: int) -> np.ndarray:
        """Which examples a step takes, over all ranks: the epoch's shuffle is a function of (seed, epoch) alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order  # once: the packing thread may be at the next epoch already
        if order is None or order[0] != epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            order = self._order = (epoch, shuffled)
        size = self.settings.global_batch_size
        return order[1][within * size : (within + 1) * size]

    def deal(self, step: int) -> list[list[np.ndarray]]:
        """The numbers of the examples in each row of each rank."""
        numbers = self.numbers(step)
        dealt = plan_micro_batches(
            self.lengths[numbers], self.costs[numbers], self.settings.max_tokens, dist.world_size()
        )
        return [[numbers[row] for row in rows] for rows in dealt]

    def work(self, step: int, rows: list[np.ndarray]) -> StepBatches:
        """A step's work for the rank that these rows were dealt to."""
        numbers = self.numbers(step)
        packed = [pack(self.examples, row, self.settings.share_prefix) for row in rows]
        (seed,) = np.random.SeedSequence([self.seed, step, dist.rank()]).generate_state(1).tolist()
        return StepBatches(
            packed, len(numbers), int(self.labels[numbers].sum()), int(self.lengths[numbers].sum()), seed
        )

    def _make(self, step: int) -> StepBatches:
        return self.work(step, self.deal(step)[dist.rank()])


class EvalBatches:
    """This rank's rows of one pass over all examples, for evaluation: each is packed when its turn comes."""

    def __init__(self, examples: Examples, settings: PackingSettings):
        lengths = _lengths(examples, settings.share_prefix)
        check_longest_fits(lengths, settings.max_tokens)
        self.examples, self.share_prefix = examples, settings.share_prefix
        dealt = plan_micro_batches(lengths, lengths, settings.max_tokens, dist.world_size())
        self.rows = dealt[dist.rank()] if len(examples) else []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (pack(self.examples, np.array(row, np.int64), self.share_prefix) for row in self.rows)


def plan_micro_batches(lengths: np.ndarray, costs: np.ndarray, max_tokens: int, world: int) -> list[list[list[int]]]:
    """Deal examples to ranks and rows: plan[rank][row] is a list of indices into `lengths`.

    As few rows as hold the tokens, rounded up to the same number on every rank, and filled evenly by cost. Only
    where even filling overflows a row are rows packed tight (best fit) instead, and dealt by cost.

    Args:
        lengths: (n,) tokens of each example, none over max_tokens.
        costs: (n,) what each costs to compute, in any unit.
    """
    by_cost = np.argsort(-costs, kind="stable").tolist()
    sizes, prices = lengths.tolist(), costs.tolist()
    need = max(1, math.ceil(sum(sizes) / max_tokens))
    rows = _even(by_cost, sizes, prices, max_tokens, math.ceil(need / world) * world)
    if rows is None:
        rows = _tight(sorted(by_cost, key=lambda i: -sizes[i]), sizes, max_tokens)
        rows += [[] for _ in range(-len(rows) % world)]
    heaviest = sorted(rows, key=lambda row: -sum(prices[i] for i in row))
    # rank r gets the r-th heaviest of each round, every other round backwards
    rounds = [heaviest[i : i + world] for i in range(0, len(heaviest), world)]
    return [[dealt[rank if i % 2 == 0 else -1 - rank] for i, dealt in enumerate(rounds)] for rank in range(world)]


def _even(
    order: list[int], sizes: list[int], prices: list[float], max_tokens: int, count: int
) -> list[list[int]] | None:
    """Costliest first, each to the cheapest row so far (LPT); None if that overflows a row."""
    rows, used = [[] for _ in range(count)], [0] * count
    heap = [(0.0, row) for row in range(count)]
    for i in order:
        price, row = heap[0]
        used[row] += sizes[i]
        if used[row] > max_tokens:
            return None
        rows[row].append(i)
        heapq.heapreplace(heap, (price + prices[i], row))
    return rows


def _tight(order: list[int], sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Best fit decreasing: each into the fullest row that still holds it. `order` is longest first."""
    rows, with_room = [], defaultdict(list)  # with_room[r]: rows that have r tokens left
    rooms = 0  # the set of those r, as bits: the smallest room that fits is the lowest bit from `size` up
    for i in order:
        size = sizes[i]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_tokens, []
            rows.append(row)
        row.append(i)
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def check_longest_fits(lengths: np.ndarray, max_tokens: int) -> None:
    """A row must hold the longest example."""
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(
            f"--max_tokens {max_tokens} is less than the longest example's {lengths.max()} tokens: "
            f"raise it to at least {lengths.max()}, or lower --max_length"
        )


def _lengths(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(n,) tokens that each example occupies in a row."""
    if share_prefix:
        return examples.lengths
    return examples.lengths + (np.diff(examples.reply_offsets) - 1) * examples.prefix_lengths


def _attention_pairs(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(n,) how many (query, key) pairs each example's attention has."""
    replies, prefix = examples.reply_lengths.astype(np.int64), examples.prefix_lengths.astype(np.int64)
    own = replies * (replies + 1) // 2 + replies * np.repeat(prefix, np.diff(examples.reply_offsets))
    copies = 1 if share_prefix else np.diff(examples.reply_offsets)
    return np.add.reduceat(own, examples.reply_offsets[:-1]) + copies * prefix * (prefix + 1) // 2


def _labels(examples: Examples) -> np.ndarray:
    """(n,) labelled tokens of each example; a text's first token is predicted by nothing."""
    loss, first, last = examples.loss, examples.starts, examples.starts + examples.lengths - 1
    before_last = np.add.reduceat(loss, np.stack([first, last], axis=1).ravel(), dtype=np.int64)[::2]
    return np.where(examples.lengths > 1, before_last + loss[last] - loss[first], 0)  # a prefix carries none
