"""A parameter of ``GroupedMLP``: all experts of a rank one after the other, each transposed.

megatron/core/transformer/moe/experts.py, ``sh_ten_build_fn``: where other layers keep [out, in] of an expert, memory
holds [in, out], and the gate's columns stand before those of up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ucp.layout import Box, FlatRange, boxes
from ucp.plan import Extent, Fragment

from .local import Local


@dataclass(frozen=True, slots=True)
class Transposed:
    """The same layer of each of a rank's `experts`, as one parameter."""

    experts: tuple[Local, ...]

    @property
    def key(self) -> str:
        """The tensor that they are regions of."""
        return self.experts[0].key

    @property
    def dtype(self) -> str:
        """Their dtype."""
        return self.experts[0].dtype

    @property
    def replica(self) -> int:
        """Tells apart ranks that hold the same."""
        return self.experts[0].replica

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(expert.size for expert in self.experts)

    def fragments(self, start: int, extent: Extent, *, replica: int) -> Iterator[Fragment]:
        """Elements from `start` on lie at `extent`, which is one dim and contiguous."""
        first = 0
        for expert in self.experts:
            low, high = max(start, first), min(start + extent.size, first + expert.size)
            if low < high:
                yield from _placed(expert, FlatRange(low - first, high - low), extent, low - start, replica)
            first += expert.size


def _placed(expert: Local, run: FlatRange, extent: Extent, skip: int, replica: int) -> Iterator[Fragment]:
    """Elements `run` of one expert's [in, out], which lie in `extent` from its element `skip` on."""
    columns = sum(box.shape[-2] for box in expert.boxes)
    for part in boxes(run, (expert.size // columns, columns)):
        (row, column), (rows, width) = part.start, part.shape
        first = 0
        for box in expert.boxes:
            low, high = max(column, first), min(column + width, first + box.shape[-2])
            if low < high:
                corner = (*box.start[:-2], box.start[-2] + low - first, box.start[-1] + row)
                place = Box(corner, (*box.shape[:-2], high - low, rows))
                offset = extent.offset + (skip + low - column) * extent.itemsize
                strides = (*(0 for _ in box.shape[:-2]), 1, width)
                yield Fragment(place, Extent(extent.object, offset, place.shape, strides, extent.dtype), replica)
            first += box.shape[-2]
        skip += part.size
