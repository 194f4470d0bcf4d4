"""Which examples stand together in a micro-batch, and which rank computes it."""

import heapq
import math
from collections import defaultdict

import numpy as np


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
