"""Regions of a tensor: boxes and flat ranges, and where they meet.

A *box* is a start and a shape, one number per dim. A *flat range* is a run of elements of the row-major (C order)
tensor; ZeRO cuts tensors this way. Both are exact integer arithmetic on shapes, with no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


def numel(shape: Shape) -> int:
    """Number of elements of `shape`; 1 for a scalar."""
    return math.prod(shape)


def row_major_strides(shape: Shape) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous C-order tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def ravel(index: Shape, shape: Shape) -> int:
    """Row-major position of `index` in a tensor of `shape`."""
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat


def unravel(position: int, shape: Shape) -> Shape:
    """Index of the element at row-major `position` of a tensor of `shape`, none of whose dims is 0."""
    index = []
    for size in reversed(shape):
        position, i = divmod(position, size)
        index.append(i)
    return tuple(reversed(index))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region: `start` and `shape`, one entry per dim. A scalar's box has none."""

    start: Shape
    shape: Shape

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.shape), "start and shape differ in length"

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), shape)

    @property
    def stop(self) -> Shape:
        """One past the last index in each dim."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return numel(self.shape)

    def within(self, shape: Shape) -> bool:
        """Whether the box lies inside a tensor of `shape`."""
        return len(shape) == len(self.shape) and all(
            a >= 0 and n >= 0 and a + n <= size for a, n, size in zip(self.start, self.shape, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where there is no common element."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def relative_to(self, origin: Shape) -> Box:
        """The same box in coordinates whose zero is `origin`."""
        return Box(tuple(a - o for a, o in zip(self.start, origin, strict=True)), self.shape)

    def flat(self, shape: Shape) -> FlatRange | None:
        """The flat range this box is in a tensor of `shape`, or None where its elements are not one run."""
        if self.size == 0:
            return FlatRange(0, 0)
        seen_partial = False
        for n, size in zip(self.shape, shape, strict=True):
            if seen_partial and n != size:
                return None
            seen_partial = seen_partial or n != 1
        return FlatRange(ravel(self.start, shape), self.size)


@dataclass(frozen=True, slots=True)
class FlatRange:
    """`length` consecutive elements from row-major position `start`."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.length

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.length

    def within(self, shape: Shape) -> bool:
        """Whether the range lies inside a tensor of `shape`."""
        return self.start >= 0 and self.length >= 0 and self.stop <= numel(shape)

    def intersect(self, other: FlatRange) -> FlatRange | None:
        """The common range, or None where there is no common element."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return FlatRange(start, stop - start) if start < stop else None

    def boxes(self, shape: Shape) -> Iterator[Box]:
        """Cut the range into boxes in row-major order: at most 2·ndim-1 of them for ndim >= 1."""
        if self.length == 0:
            return
        if not shape:
            yield Box((), ())
            return
        yield from _boxes(self.start, self.stop, shape, ())


def _boxes(start: int, stop: int, shape: Shape, outer: Shape) -> Iterator[Box]:
    """Boxes of positions [start, stop) of the sub-tensor at index `outer`, whose own dims are `shape`."""
    row = numel(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if len(shape) > 1 and first == last:
        yield from _boxes(head, tail, shape[1:], (*outer, first))
        return
    if head:
        yield from _boxes(head, row, shape[1:], (*outer, first))
        first += 1
    if first < last:
        ones = (1,) * len(outer)
        zeros = (0,) * (len(shape) - 1)
        yield Box((*outer, first, *zeros), (*ones, last - first, *shape[1:]))
    if tail:
        yield from _boxes(0, tail, shape[1:], (*outer, last))


Region = Box | FlatRange


def boxes(region: Region, shape: Shape) -> Iterator[Box]:
    """The boxes that make up `region` of a tensor of `shape`, in row-major order; none if it is empty."""
    if isinstance(region, FlatRange):
        yield from region.boxes(shape)
    elif region.size:
        yield region


def as_flat(region: Region, shape: Shape) -> FlatRange | None:
    """`region` as one flat range of a tensor of `shape`, or None where its elements are not one run."""
    return region if isinstance(region, FlatRange) else region.flat(shape)
