"""Dynamic batching: what waits while one micro-batch is computed makes the next, whichever clients posted it.

Texts that begin alike share the computation of what they have in common, also if several requests brought them: RL
trainers post the completions of one prompt one by one.

Shapes: N texts.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

import numpy as np
from torch import Tensor

from rm.data.encode import common_prefix
from rm.data.examples import Example, Examples

WINDOW = 4  # micro-batches: how far texts are looked through for those that share a prefix


class Job:
    """The texts of one request."""

    def __init__(self, texts: list[np.ndarray]):
        """
        Args:
            texts: N arrays of token ids.
        """
        self.texts, self.rewards, self.future = texts, np.empty(len(texts), np.float32), Future()
        self.waiting = dict.fromkeys(range(len(texts)))  # a set in order: texts that no micro-batch has taken yet
        self.missing = len(texts)  # texts without a reward


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
        self.jobs: list[Job] = []  # the oldest first
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
                window = self._window()
            if window:
                self._compute(window)
            elif self.closed:
                return

    def _window(self) -> list[tuple[Job, int]]:
        """The texts that may be computed next: one of each job in turn, so that no job waits for all of another."""
        self.jobs = [job for job in self.jobs if job.waiting and not job.future.done()]  # not cancelled, nor failed
        window, tokens = [], 0
        for one_of_each in itertools.zip_longest(*(job.waiting for job in self.jobs)):
            for job, i in zip(self.jobs, one_of_each, strict=True):
                if i is not None:
                    window.append((job, i))
                    tokens += len(job.texts[i])
            if tokens >= WINDOW * self.max_tokens:
                break
        return window

    def _compute(self, window: list[tuple[Job, int]]) -> None:
        """Compute the first text of the window, and what fits into one micro-batch with it."""
        texts = [job.texts[i] for job, i in window]
        # Each group as its texts' positions in the window, and the group with the oldest text first.
        groups, room = [], self.max_tokens
        for group in sorted(map(sorted, share_prefixes(texts, self.max_tokens))):
            tokens = group_tokens([texts[k] for k in group])
            if tokens <= room or not groups:
                groups.append(group)
                room -= tokens
        taken = [window[k] for group in groups for k in group]
        for job, i in taken:
            del job.waiting[i]
        try:
            examples = examples_of(texts, groups)
            rewards = self.rewards_of(examples).tolist()
        except Exception as error:  # whatever it was, the other requests are to be answered
            for job, _ in taken:
                _settle(job.future.set_exception, error)
            return
        self.computed(len(taken), sum(len(job.texts[i]) for job, i in taken), int(examples.lengths.sum()))
        for (job, i), reward in zip(taken, rewards, strict=True):
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
