"""Dynamic batching: what waits while one micro-batch is computed becomes the next, whichever clients posted it.

Texts that begin alike share the computation of what they have in common, also if several requests brought them: RL
trainers post the completions of one prompt one by one.

Shapes: N texts.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rm.data.encode import common_prefix
from rm.data.examples import Example, Examples


@dataclass(eq=False)
class Job:
    """The texts of one request."""

    texts: list[np.ndarray]  # N arrays of token ids
    future: Future = field(default_factory=Future)  # of their (N,) rewards
    rewards: np.ndarray = None
    to_compute: deque[list[int]] = None  # groups of texts, by their indices, that no micro-batch has taken yet
    missing: int = 0  # texts without a reward

    def __post_init__(self):
        self.rewards, self.missing = np.empty(len(self.texts), np.float32), len(self.texts)


class Batcher:
    """Computes the rewards of jobs, in one thread: the only one that uses the model."""

    def __init__(
        self, rewards: Callable[[Examples], Tensor], max_tokens: int, computed: Callable[[int, int, int], None]
    ):
        """
        Args:
            rewards: Examples -> the reward of each reply.
            max_tokens: of a micro-batch; only a single longer text exceeds it.
            computed: told (texts, their tokens, tokens computed for them) of every micro-batch.
        """
        self.rewards_of, self.max_tokens, self.computed = rewards, max_tokens, computed
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, texts: list[np.ndarray]) -> Future:
        """A future of the (N,) rewards of N texts; it may be cancelled, and raises what the computation raised."""
        job = Job(texts)
        if not texts:
            job.future.set_result(job.rewards)
            return job.future
        job.to_compute = deque(share_prefixes(texts, self.max_tokens))
        with self.changed:
            if self.closed:
                raise RuntimeError("the server is stopping")
            self.jobs.append(job)
            self.changed.notify()
        return job.future

    def close(self) -> None:
        """Compute what has been submitted, and end."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.closed)
                taken = self._take()
            if taken:
                self._compute(taken)
            elif self.closed:
                return

    def _take(self) -> list[tuple[Job, int]]:
        """The texts of the next micro-batch: from each job in turn, so that a small one does not wait for a large."""
        taken, room = [], self.max_tokens
        while self.jobs:
            job = self.jobs[0]
            if job.future.done():  # cancelled, or failed in an earlier micro-batch
                self.jobs.popleft()
                continue
            group = job.to_compute[0]
            room -= group_tokens([job.texts[i] for i in group])
            if room < 0 and taken:
                break
            self.jobs.popleft()
            taken += [(job, i) for i in job.to_compute.popleft()]
            if job.to_compute:
                self.jobs.append(job)
        return taken

    def _compute(self, taken: list[tuple[Job, int]]) -> None:
        texts = [job.texts[i] for job, i in taken]
        try:
            groups = share_prefixes(texts, self.max_tokens)
            examples = examples_of(texts, groups)
            rewards = self.rewards_of(examples).numpy()
        except Exception as error:  # whatever it was, the other requests are to be answered
            for job, _ in taken:
                _settle(job.future.set_exception, error)
            return
        self.computed(len(texts), sum(map(len, texts)), int(examples.lengths.sum()))
        order = [i for group in groups for i in group]  # of the texts in `examples`
        for position, reward in zip(order, rewards, strict=True):
            job, i = taken[position]
            job.rewards[i] = reward
            job.missing -= 1
            if not job.missing:
                _settle(job.future.set_result, job.rewards)


def _settle(set_outcome: Callable, outcome) -> None:
    with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
        set_outcome(outcome)


def group_tokens(texts: Sequence[np.ndarray]) -> int:
    """Tokens computed for texts that share their common prefix."""
    if len(texts) == 1:
        return len(texts[0])
    return sum(map(len, texts)) - (len(texts) - 1) * common_prefix(texts)


def examples_of(texts: Sequence[np.ndarray], groups: Sequence[Sequence[int]]) -> Examples:
    """An example for each group of texts: their common prefix, and what follows it in each."""
    examples = []
    for group in groups:
        members = [texts[i] for i in group]
        length = common_prefix(members) if len(members) > 1 else 0
        replies = tuple(text[length:] for text in members)
        no_loss = tuple(np.zeros(len(reply), bool) for reply in replies)
        examples.append(Example(members[0][:length], replies, no_loss))
    return Examples.build(examples)


def share_prefixes(texts: Sequence[np.ndarray], max_tokens: int) -> list[list[int]]:
    """Group texts so that computing each group's common prefix once saves tokens; no group has over `max_tokens`.

    In sorted order, the texts that share a prefix are neighbours. Neighbouring groups are joined in the order of how
    much the texts on both sides of their border have in common, the most first, where the whole saves more than its
    parts save apart: the replies to two prompts under one system message stay two groups.

    Returns:
        groups of indices into `texts`, which is each in one group.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())
    shared = [common_prefix([texts[a], texts[b]]) for a, b in zip(order, order[1:], strict=False)]
    tokens_before = np.cumsum([0, *(len(texts[i]) for i in order)]).tolist()
    # A block is a range of `order` that has been joined, kept at both its ends: (first, last, tokens saved, groups).
    starting = {k: (k, k, 0, [(k, k)]) for k in range(len(order))}
    ending = dict(starting)
    for border in sorted(range(len(shared)), key=lambda k: -shared[k]):
        first, _, saved_left, left = ending[border]
        _, last, saved_right, right = starting[border + 1]
        apart = saved_left + saved_right
        saved = (last - first) * shared[border]  # no two neighbours in the block share less
        fits = tokens_before[last + 1] - tokens_before[first] - saved <= max_tokens
        if fits and saved > apart:
            block = first, last, saved, [(first, last)]
        else:
            block = first, last, apart, left + right
        starting[first] = ending[last] = block
    return [order[first : last + 1] for first, last in starting[0][3]] if order else []
