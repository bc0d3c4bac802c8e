"""Composition: a fragment of a shard, and a block of it that is a part of a logical tensor, are a fragment of that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ucp.layout import FlatRange, Shape, numel, row_major_strides
from ucp.layout.block import Block, View, clip, linear
from ucp.plan.fragment import Extent, Fragment


def compose(
    fragment: Fragment, block: Block, shape: Shape, *, view: View, replica: int = 0, term: int = 0
) -> Iterator[Fragment]:
    """What `fragment`, a region of a shard of `shape`, holds of `block`, which is in the coordinates of `view`.

    Flat ranges stay flat where the block is one run in both the shard and the view; all else are boxes in the view. A
    fragment that is a box is in the shard's own dims. Its own `replica` and `term` do not count.
    """
    if isinstance(fragment.region, FlatRange):
        runs = _runs(block, shape, view)
        if runs is not None:
            yield from _flat(fragment, *runs, replica=replica, term=term)
            return
    whole = fragment.region.size == numel(shape)
    for part in [block] if whole else clip(block, shape, fragment.region):
        yield Fragment(part.box, _extent(fragment, part, shape), replica, term)


@lru_cache(maxsize=4096)
def _runs(block: Block, shape: Shape, view: View) -> tuple[FlatRange, FlatRange] | None:
    """The block as a run of the shard and one of the view's tensor, element for element; None if it is not."""
    held = block.box.flat(view.shape)
    if held is None or not held.length:
        return None
    start, steps = linear(block, row_major_strides(shape))
    dense = zip(block.box.shape, steps, row_major_strides(block.box.shape), strict=True)
    if any(n > 1 and step != wanted for n, step, wanted in dense):
        return None
    return FlatRange(start, held.length), held


def _flat(fragment: Fragment, own: FlatRange, held: FlatRange, *, replica: int, term: int) -> Iterator[Fragment]:
    """What `fragment` holds of the run `own` of its shard, which is the run `held` of the tensor."""
    assert isinstance(fragment.region, FlatRange)
    met = fragment.region.intersect(own)
    if met is not None:
        extent, (unit,) = fragment.extent, fragment.extent.strides
        offset = extent.offset + (met.start - fragment.region.start) * unit * extent.itemsize
        part = Extent(extent.object, offset, (met.length,), (unit,), extent.dtype)
        yield Fragment(FlatRange(held.start + met.start - own.start, met.length), part, replica, term)


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
