"""Composition: a fragment of a shard, and a block of the shard that is a part of a logical tensor, make a fragment of
the logical tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ucp.layout import FlatRange, Shape, row_major_strides
from ucp.layout.block import Block, clip, linear
from ucp.plan.fragment import Extent, Fragment


def compose(fragment: Fragment, block: Block, shape: Shape) -> Iterator[Fragment]:
    """What `fragment`, a region of a shard of `shape`, holds of `block`: boxes in the view that the block is in.

    A fragment that is a box is in the shard's own dims. `replica` and `term` stay the fragment's.
    """
    for part in clip(block, shape, fragment.region):
        yield replace(fragment, region=part.box, extent=_extent(fragment, part, shape))


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
