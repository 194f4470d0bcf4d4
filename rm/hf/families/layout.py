"""How a tensor in a file holds tensors of ours, when it is not simply one of them.

Ours are separate in every family, so that adapters and optimizers can name them; on disk q, k and v may be one tensor,
and a matrix may lie on its side. A `Layout` is that difference as data. Its one piece of arithmetic, `spans`, serves
reading and writing, so that the two cannot disagree.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]

QKV = ("layers.{}.attn.q_proj", "layers.{}.attn.k_proj", "layers.{}.attn.v_proj")


@dataclass(frozen=True)
class Layout:
    """A module of theirs, as a table of modules spells it where one name is not enough.

    Attributes:
        parts: our modules that it holds, {} for the layer's number; their rows lie one after the other.
        by_head: instead, their rows are dealt out: those of the first kv head's q, k and v, those of the second's, ...
        transposed: matrices are stored as (in, out), where `nn.Linear` has (out, in).
    """

    parts: tuple[str, ...]
    by_head: bool = False
    transposed: bool = False

    def shape(self, shapes: list[Shape]) -> Shape:
        """Theirs, of ours."""
        stacked = sum(shape[0] for shape in shapes), *shapes[0][1:]
        return stacked[::-1] if self.transposed else stacked

    def read(
        self, stored, part: int, where: tuple[slice, ...], shapes: list[Shape], kv_heads: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """A block of our tensor number `part`, out of theirs: (rows within the block, their values), and so on.

        Args:
            stored: theirs; slicing it reads no more than the slice.
            where: the block: a slice for each dimension of ours.
            shapes: of all that is ours in it.
        """
        for ours, theirs in self.spans(part, where[0], shapes, kv_heads):
            index = theirs, *where[1:]
            yield ours, stored[index[::-1]].T if self.transposed and len(index) > 1 else stored[index]

    def join(self, parts: list[Tensor], kv_heads: int) -> Tensor:
        """Theirs, of ours."""
        shapes = [tuple(part.shape) for part in parts]
        out = parts[0].new_empty(sum(len(part) for part in parts), *shapes[0][1:])
        for number, part in enumerate(parts):
            for ours, theirs in self.spans(number, slice(0, len(part)), shapes, kv_heads):
                out[theirs] = part[ours]
        return out.T if self.transposed and out.ndim > 1 else out

    def spans(self, part: int, rows: slice, shapes: list[Shape], kv_heads: int) -> Iterator[tuple[slice, slice]]:
        """Where rows of our tensor number `part` lie: (counted from `rows.start`, counted in theirs), and so on."""
        groups = kv_heads if self.by_head else 1
        sizes = [shape[0] // groups for shape in shapes]  # rows of a group, tensor by tensor
        size, start = sizes[part], sum(sizes[:part])
        for group in range(rows.start // size, -(-rows.stop // size)):
            low, high = max(rows.start, group * size), min(rows.stop, (group + 1) * size)
            shift = group * (sum(sizes) - size) + start
            yield slice(low - rows.start, high - rows.start), slice(low + shift, high + shift)
