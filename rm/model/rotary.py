"""Rotary positions (RoFormer, arXiv 2104.09864): the cosines and sines of a micro-batch, and q or k rotated by them.

Shapes: T tokens in a micro-batch, H heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]  # cosines and sines, (T, 1, 2 * number of frequencies) each


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer, whatever scaling its family applies.

    Attributes:
        frequencies: radians per position, one for each pair of dimensions; where there are fewer than head_dim / 2,
            the last dimensions of a head are not rotated. Exact fp32 numbers.
        scale: factor of cosine and sine (YaRN, arXiv 2309.00071).
        interleaved: whether a pair is two neighbouring dimensions, and not one of each half of those that are rotated.
        query_growth, query_length: q is multiplied by 1 + query_growth * log(1 + floor(position / query_length)), as in
            Llama 4 and Ministral 3. Every dimension has to be rotated then.
        longest: texts of more positions would have other frequencies; 0: of any number have these.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    query_growth: float = 0.0
    query_length: int = 1
    longest: int = 0


class Tables(NamedTuple):
    """What q and what k is rotated by."""

    q: Table | None
    k: Table | None


def rope_tables(position: Tensor, rope: Rope | None, dtype: torch.dtype) -> Tables:
    """Cosines and sines of rotary positions, in the half-rotation form of Hugging Face.

    The sines include the sign of the rotation, so that `rotate` needs no negated half. Angles are computed in fp32
    whatever `dtype`.

    Args:
        position: (T,) of each token in its own text.
    """
    if rope is None:
        return Tables(None, None)
    frequency = torch.tensor(rope.frequencies, dtype=torch.float32).to(position.device, non_blocking=True)
    angle = position[:, None].float() * frequency  # (T, E/2)
    cos, sin = angle.cos() * rope.scale, angle.sin() * rope.scale
    table = torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
    k = table[0].to(dtype), table[1].to(dtype)
    if not rope.query_growth:
        return Tables(k, k)
    growth = 1 + rope.query_growth * (1 + (position // rope.query_length)).log()[:, None, None]
    return Tables(((growth * table[0]).to(dtype), (growth * table[1]).to(dtype)), k)


def rotate(x: Tensor, table: Table) -> Tensor:
    """x (T, H, E) rotated by its position."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_first(x: Tensor, table: Table) -> Tensor:
    """x (T, H, E), of which only the first dimensions are rotated: as many as there are cosines."""
    rotary, passed_through = x.tensor_split([table[0].shape[-1]], -1)
    return torch.cat([rotate(rotary, table), passed_through], -1)


def rotate_neighbours(x: Tensor, table: Table) -> Tensor:
    """x (T, H, E) with interleaved pairs. The result has the halves apart: q.k is the same where both have."""
    rotary, passed_through = x.tensor_split([table[0].shape[-1]], -1)
    halves = rotary.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([rotate(halves, table), passed_through], -1)


def rotation(rope: Rope | None, head_dim: int) -> Callable[[Tensor, Table | None], Tensor]:
    """The function that applies a layer's rotary positions to q or k, given its table."""
    if rope is None:
        return lambda x, table: x
    whole = 2 * len(rope.frequencies) == head_dim
    assert whole or not rope.query_growth
    if rope.interleaved:
        return rotate_neighbours
    return rotate if whole else rotate_first
