"""Composition: a fragment of a shard, and a block of it that is a part of a logical tensor, are a fragment of that."""

from __future__ import annotations

from collections.abc import Iterator

from ucp.layout import FlatRange, Shape, numel, row_major_strides
from ucp.layout.block import Block, clip, linear
from ucp.plan.fragment import Extent, Fragment


def compose(fragment: Fragment, block: Block, shape: Shape, *, replica: int = 0, term: int = 0) -> Iterator[Fragment]:
    """What `fragment`, a region of a shard of `shape`, holds of `block`: boxes in the view that the block is in.

    A fragment that is a box is in the shard's own dims. Its own `replica` and `term` do not count.
    """
    whole = fragment.region.size == numel(shape)
    for part in [block] if whole else clip(block, shape, fragment.region):
        yield Fragment(part.box, _extent(fragment, part, shape), replica, term)


def _extent(fragment: Fragment, block: Block, shape: Shape) -> Extent:
    region, extent = fragment.region, fragment.extent
    strides: tuple[int, ...]
    if isinstance(region, FlatRange):
        (unit,) = extent.strides
        at, steps = linear(block, row_major_strides(shape))
        first, strides = (at - region.start) * unit, tuple(step * unit for step in steps)
    else:
        first, strides = linear(block, extent.strides)
        first -= sum(a * stride for a, stride in zip(region.start, extent.strides, strict=True))
    return Extent(extent.object, extent.offset + first * extent.itemsize, block.box.shape, strides, extent.dtype)
