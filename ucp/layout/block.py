"""Blocks: which elements of a shard are which elements of a logical tensor, as strided boxes with no data.

A logical tensor is seen through a *view*: each dim split into factors, outer to inner, which are the leaf dims of its
layout. In the view's coordinates the elements a block speaks of are a box; in the shard they lie a fixed step apart
along each factor. Composed, permuted, concatenated, cut and padded dims all come down to such blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.layout.interval import Span, boxes_between
from ucp.layout.region import Box, FlatRange, Region, Shape, row_major_strides

NO_STEP = (-1, 0)
"""The step of a factor that has length 1 in a block."""


@dataclass(frozen=True, slots=True)
class View:
    """The factors of each dim of a logical tensor, outer to inner; each dim has one at least.

    ``((4, 3, 8), (16,))`` is a view of ``[96, 16]``.
    """

    factors: tuple[Shape, ...]

    @classmethod
    def plain(cls, shape: Shape) -> View:
        """The tensor of `shape` as it is: one factor per dim."""
        return cls(tuple((n,) for n in shape))

    @property
    def tensor(self) -> Shape:
        """Shape of the logical tensor."""
        return tuple(math.prod(group) for group in self.factors)

    @property
    def shape(self) -> Shape:
        """All factors in order: the shape in whose coordinates boxes are given."""
        return tuple(n for group in self.factors for n in group)


@dataclass(frozen=True, slots=True)
class Block:
    """`box` of the view of a logical tensor lies in the shard.

    Element ``box.start`` is at index `start` of the shard (one entry per dim of the shard). One step along factor `i`
    of the view moves ``steps[i] = (dim, stride)``: by `stride` along `dim` of the shard. A factor along which the box
    has length 1 (one that the shard's name or rank fixes, say) has the step ``(-1, 0)``.
    """

    box: Box
    start: Shape
    steps: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.box.size

    def part(self, spans: Sequence[Span]) -> Block:
        """The part with the given (first index, count) along each factor, indices counted from ``box.start``."""
        if all(span == (0, n) for span, n in zip(spans, self.box.shape, strict=True)):
            return self
        start = list(self.start)
        for (first, _), (dim, stride) in zip(spans, self.steps, strict=True):
            if first:
                start[dim] += first * stride
        box = Box(
            tuple(a + first for a, (first, _) in zip(self.box.start, spans, strict=True)),
            tuple(count for _, count in spans),
        )
        steps = tuple(NO_STEP if count == 1 else step for (_, count), step in zip(spans, self.steps, strict=True))
        return Block(box, tuple(start), steps)


def linear(block: Block, strides: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Where the block lies when its shard is a strided array with `strides` (elements, one per dim of the shard).

    Returns the element offset of ``block.box.start`` from the first element of the shard, and the stride in elements
    along each factor of the view (0 where the box has length 1).
    """
    offset = sum(index * stride for index, stride in zip(block.start, strides, strict=True))
    return offset, tuple(0 if dim < 0 else step * strides[dim] for dim, step in block.steps)


def clip(block: Block, shard_shape: Shape, region: Region) -> list[Block]:
    """The part of `block` whose elements lie in `region` of its shard, a box or a range of the row-major shard.

    Exact, in few blocks: at most 2·k-1 per dim that a box cuts, or in all for a range, over k factors.
    """
    if isinstance(region, FlatRange):
        offset, strides = linear(block, row_major_strides(shard_shape))
        return [block.part(spans) for spans in _spans(block, strides, region.start - offset, region.stop - offset)]
    found = [block]
    for dim, (low, high) in enumerate(zip(region.start, region.stop, strict=True)):
        found = [part for inner in found for part in _clip_dim(inner, dim, low, high)]
    return found


def _clip_dim(block: Block, dim: int, low: int, high: int) -> Iterator[Block]:
    strides = [stride if of == dim else 0 for of, stride in block.steps]
    for spans in _spans(block, strides, low - block.start[dim], high - block.start[dim]):
        yield block.part(spans)


def _spans(block: Block, strides: Sequence[int], low: int, high: int) -> Iterator[list[Span]]:
    """Parts of the block's box in which the sum of index times stride lies in [low, high). Stride 0: no matter."""
    shape = block.box.shape
    order = sorted((i for i, n in enumerate(shape) if n > 1 and strides[i]), key=lambda i: -strides[i])
    for found in boxes_between([(strides[i], shape[i]) for i in order], low, high):
        spans: list[Span] = [(0, n) for n in shape]
        for i, span in zip(order, found, strict=True):
            spans[i] = span
        yield spans
