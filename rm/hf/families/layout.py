"""How one tensor of a Hugging Face checkpoint holds one or more parameters of our model.

Our model has separate q, k and v projections in every family, so that adapters and optimizers can name them. A
checkpoint may store them as one fused tensor, and may store matrices transposed. A `Layout` describes that difference
as data. Reading and writing use the same arithmetic, `Layout.spans`, so that the two cannot disagree.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]

QKV = ("layers.{}.attn.q_proj", "layers.{}.attn.k_proj", "layers.{}.attn.v_proj")


@dataclass(frozen=True)
class Layout:
    """What a module of the checkpoint holds; the value in a family's table of modules where a name is not enough.

    Attributes:
        parts: the modules of our model that it holds, {} for the layer index. Their rows are stacked in this order.
        by_head: rows are interleaved by kv head instead: the rows of q, k and v of the first kv head, then those of the
            second, and so on.
        transposed: matrices are stored as (in, out), whereas `nn.Linear` has (out, in).
    """

    parts: tuple[str, ...]
    by_head: bool = False
    transposed: bool = False

    def shape(self, shapes: list[Shape]) -> Shape:
        """The checkpoint tensor's shape, assembled from those of our parameters."""
        stacked = sum(shape[0] for shape in shapes), *shapes[0][1:]
        return stacked[::-1] if self.transposed else stacked

    def read(
        self, stored, part: int, block: tuple[slice, ...], shapes: list[Shape], kv_heads: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Read a block of one of our parameters out of the checkpoint tensor.

        Args:
            stored: the checkpoint tensor, or a safetensors slice of it; indexing reads no more than what is indexed.
            part: index of our parameter in `parts`.
            block: the block, as a slice for each dimension of our parameter.
            shapes: the shapes of all our parameters in the checkpoint tensor.
            kv_heads: number of kv heads.

        Yields:
            (rows counted from the start of the block, their values), until the block is complete.
        """
        for block_rows, stored_rows in self.spans(part, block[0], shapes, kv_heads):
            index = stored_rows, *block[1:]
            if self.transposed and len(index) > 1:  # biases have one dimension and are stored as they are
                yield block_rows, stored[index[::-1]].T
            else:
                yield block_rows, stored[index]

    def join(self, parts: list[Tensor], kv_heads: int) -> Tensor:
        """The checkpoint tensor, assembled from our parameters."""
        shapes = [tuple(part.shape) for part in parts]
        out = parts[0].new_empty(sum(len(part) for part in parts), *shapes[0][1:])
        for i, part in enumerate(parts):
            for part_rows, stored_rows in self.spans(i, slice(0, len(part)), shapes, kv_heads):
                out[stored_rows] = part[part_rows]
        return out.T if self.transposed and out.ndim > 1 else out

    def spans(self, part: int, rows: slice, shapes: list[Shape], kv_heads: int) -> Iterator[tuple[slice, slice]]:
        """Where the given rows of one of our parameters are in the checkpoint tensor (before it is transposed).

        Args:
            part: index of our parameter in `parts`.

        Yields:
            (rows counted from `rows.start`, rows of the checkpoint tensor) for each contiguous run of rows.
        """
        # Stacked parts are the special case of one group that holds everything.
        groups = kv_heads if self.by_head else 1
        sizes = [shape[0] // groups for shape in shapes]  # rows of one group, for each part
        size, start = sizes[part], sum(sizes[:part])
        first_group, end_group = rows.start // size, -(-rows.stop // size)  # -(-a // b) rounds up
        for group in range(first_group, end_group):
            low, high = max(rows.start, group * size), min(rows.stop, (group + 1) * size)
            # Row i of the part is row i + shift of the checkpoint tensor: before it are the other parts' rows of all
            # earlier groups, and the earlier parts' rows of this group.
            shift = group * (sum(sizes) - size) + start
            yield slice(low - rows.start, high - rows.start), slice(low + shift, high + shift)
