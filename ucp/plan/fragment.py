"""Fragments: which region of a logical tensor lies at which bytes.

A readable checkpoint is a list of fragments and so is a target; everything ucp does is to intersect two such lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ucp.layout import Box, FlatRange, Region, Shape, as_flat, boxes, itemsize, numel, ravel, row_major_strides

ZEROS = "\0zeros"
"""The object of extents that no object holds and that read as zeros: padding which a target asks for."""


class Key(NamedTuple):
    """One state of one logical tensor, such as ``("embed.weight", "exp_avg")``."""

    name: str
    state: str

    def __str__(self) -> str:
        return f"{self.name}[{self.state}]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one state of one logical tensor."""

    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return numel(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor without padding."""
        return self.size * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of a strided array lie: `offset` is the byte of its first element, strides count elements.

    `object` is a path relative to the checkpoint. Elements are little-endian.
    """

    object: str
    offset: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def contiguous(cls, object: str, offset: int, shape: Shape, dtype: str) -> Extent:
        """A C-order array of `shape` that starts at byte `offset`."""
        return cls(object, offset, shape, row_major_strides(shape), dtype)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return itemsize(self.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return numel(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements themselves, gaps not counted."""
        return self.size * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are one run of bytes in row-major order."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    @property
    def span(self) -> tuple[int, int]:
        """First byte and one past the last byte that any element touches."""
        if self.size == 0:
            return (self.offset, self.offset)
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (self.offset, self.offset + (last + 1) * self.itemsize)

    def sub(self, box: Box) -> Extent:
        """The part of the array inside `box`, in the array's own coordinates."""
        skip = sum(a * stride for a, stride in zip(box.start, self.strides, strict=True))
        return Extent(self.object, self.offset + skip * self.itemsize, box.shape, self.strides, self.dtype)


@dataclass(frozen=True, slots=True)
class Fragment:
    """`region` of one logical tensor lies at `extent`.

    A Box is in the coordinates of the view that the tensor's fragments are given in, mostly its own dims, and the
    extent has the box's shape; for a FlatRange the extent has one dim, the range's length. `replica` numbers equal
    copies of the same region, 0 for the one to read first; `term` the terms of a tensor that is a mean or a sum.
    """

    region: Region
    extent: Extent
    replica: int = 0
    term: int = 0

    def __post_init__(self) -> None:
        shape = (self.region.length,) if isinstance(self.region, FlatRange) else self.region.shape
        assert shape == self.extent.shape, f"region {self.region} and extent {self.extent} differ in shape"

    def sub(self, region: Region, shape: Shape) -> Extent:
        """Where `region` lies, which is inside this fragment of a tensor of `shape`.

        A flat range can be asked only of a fragment that is one flat run of bytes; ask for boxes otherwise.
        """
        if isinstance(self.region, Box) and isinstance(region, Box):
            return self.extent.sub(region.relative_to(self.region.start))
        mine = as_flat(self.region, shape)
        assert mine is not None, "a flat range of a box that is not flat"
        unit = self.extent.strides[0] if isinstance(self.region, FlatRange) else 1
        return _flat_sub(self.extent, region, shape, mine.start, unit)

    def cut(self, most: int) -> Iterator[Fragment]:
        """Cut the fragment into consecutive ones of at most `most` elements, in row-major order."""
        if isinstance(self.region, Box):
            for box in split(self.region, most):
                yield replace(self, region=box, extent=self.extent.sub(box.relative_to(self.region.start)))
            return
        for start in range(0, self.region.length, most):
            run = Box((start,), (min(most, self.region.length - start),))
            region = FlatRange(self.region.start + start, run.size)
            yield replace(self, region=region, extent=self.extent.sub(run))

    def as_flat(self, shape: Shape) -> Fragment | None:
        """The same fragment with a FlatRange region, or None where region or bytes are not one flat run."""
        if isinstance(self.region, FlatRange):
            return self
        flat = self.region.flat(shape)
        if flat is None or not self.extent.is_contiguous:
            return None
        extent = Extent.contiguous(self.extent.object, self.extent.offset, (flat.length,), self.extent.dtype)
        return replace(self, region=flat, extent=extent)


def split(box: Box, most: int) -> Iterator[Box]:
    """Cut `box` along its outer dims into boxes of at most `most` elements, in row-major order."""
    if box.size <= most:
        yield box
        return
    dim = next(d for d, n in enumerate(box.shape) if n > 1)
    step = max(1, most // (box.size // box.shape[dim]))
    for start in range(0, box.shape[dim], step):
        count = min(step, box.shape[dim] - start)
        place = tuple(a + start if d == dim else a for d, a in enumerate(box.start))
        shape = tuple(count if d == dim else n for d, n in enumerate(box.shape))
        yield from split(Box(place, shape), most)


def _flat_sub(extent: Extent, region: Region, shape: Shape, start: int, unit: int) -> Extent:
    """`region` of a tensor whose elements from position `start` on lie at `extent`, `unit` elements apart."""
    sizes: Shape
    strides: tuple[int, ...]
    if isinstance(region, FlatRange):
        first, sizes, strides = region.start, (region.length,), (unit,)
    else:
        first, sizes = ravel(region.start, shape), region.shape
        strides = tuple(stride * unit for stride in row_major_strides(shape))
    offset = extent.offset + (first - start) * unit * extent.itemsize
    return Extent(extent.object, offset, sizes, strides, extent.dtype)


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy one strided block; source and target have the same shape, and dtypes that may differ (a cast)."""

    source: Extent
    target: Extent

    def __post_init__(self) -> None:
        assert self.source.shape == self.target.shape, "a copy needs equal shapes"


def common(source: Fragment, target: Fragment, shape: Shape) -> list[Copy]:
    """The block copies that bring the common elements of two fragments of a tensor of `shape` across.

    For fragments in a view, `shape` is that of the view. One copy where both are flat runs, else one per pair of boxes
    that meet.
    """
    a, b = source.as_flat(shape), target.as_flat(shape)
    if a is not None and b is not None:
        assert isinstance(a.region, FlatRange) and isinstance(b.region, FlatRange)
        met = a.region.intersect(b.region)
        return [Copy(a.sub(met, shape), b.sub(met, shape))] if met else []
    copies = []
    for box_a in boxes(source.region, shape):
        for box_b in boxes(target.region, shape):
            hit = box_a.intersect(box_b)
            if hit is not None:
                copies.append(Copy(source.sub(hit, shape), target.sub(hit, shape)))
    return copies
