"""Hypothesis strategies for regions, and for fragmentations of a tensor with their bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from ucp.layout import Box, FlatRange, Region, Shape, numel
from ucp.layout.block import View
from ucp.plan import Extent, Fragment


@st.composite
def shapes(draw: st.DrawFn, *, max_dims: int = 4, max_side: int = 6, min_side: int = 1) -> Shape:
    """A small shape; a scalar's has no dims."""
    return tuple(draw(st.lists(st.integers(min_side, max_side), max_size=max_dims)))


@st.composite
def flat_ranges(draw: st.DrawFn, shape: Shape) -> FlatRange:
    """A flat range, perhaps empty, inside `shape`."""
    start = draw(st.integers(0, numel(shape)))
    return FlatRange(start, draw(st.integers(0, numel(shape) - start)))


@st.composite
def regular_boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """A non-empty box inside `shape`, which has no dim of size 0."""
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(start, tuple(draw(st.integers(1, size - a)) for a, size in zip(start, shape, strict=True)))


def regions(shape: Shape) -> st.SearchStrategy[Region]:
    """A box or a flat range inside `shape`."""
    return st.one_of(regular_boxes(shape), flat_ranges(shape))


@st.composite
def flat_cuts(draw: st.DrawFn, shape: Shape) -> list[FlatRange]:
    """A partition of `shape` into flat ranges, as ZeRO makes them."""
    total = numel(shape)
    at = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=5))})
    return [FlatRange(a, b - a) for a, b in pairwise(at)]


@st.composite
def box_cuts(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """A partition of `shape` into boxes by cuts of boxes, not only along a grid."""
    parts = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        which = draw(st.integers(0, len(parts) - 1))
        box, dim = parts[which], draw(st.integers(0, len(shape) - 1))
        if box.shape[dim] < 2:
            continue
        cut = draw(st.integers(1, box.shape[dim] - 1))
        parts[which : which + 1] = _split(box, dim, cut)
    return parts


def _split(box: Box, dim: int, cut: int) -> list[Box]:
    def with_dim(values: Shape, value: int) -> Shape:
        return (*values[:dim], value, *values[dim + 1 :])

    head = Box(box.start, with_dim(box.shape, cut))
    tail_start = with_dim(box.start, box.start[dim] + cut)
    return [head, Box(tail_start, with_dim(box.shape, box.shape[dim] - cut))]


@st.composite
def views(draw: st.DrawFn, shape: Shape) -> View:
    """A view of a tensor of `shape`, with a factor of size 1 here and there."""
    return View(tuple(tuple(draw(factors(n))) for n in shape))


@st.composite
def factors(draw: st.DrawFn, size: int) -> Shape:
    """Factors of `size`, outer to inner."""
    found = []
    for _ in range(draw(st.integers(0, 2))):
        found.append(draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])))
        size //= found[-1]
    return (*found, size)


@st.composite
def extents(draw: st.DrawFn, object: str, shape: Shape, dtype: str, itemsize: int) -> Extent:
    """An extent for `shape` in an object of its own: some order of dims, some gaps, some offset."""
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), draw(st.integers(1, 2))
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim] + draw(st.integers(0, 1))
    return Extent(object, draw(st.integers(0, 3)) * itemsize, shape, tuple(strides), dtype)


@st.composite
def fragmentations(draw: st.DrawFn, shape: Shape, dtype: str = "int32", itemsize: int = 4) -> list[Fragment]:
    """Fragments that hold a tensor of `shape` exactly once, each in an object ``f0``, ``f1``, …, in any order."""
    regions: list[Region] = list(draw(st.one_of(flat_cuts(shape), box_cuts(shape))))
    found = []
    for number, region in enumerate(draw(st.permutations(regions))):
        sizes = (region.length,) if isinstance(region, FlatRange) else region.shape
        found.append(Fragment(region, draw(extents(f"f{number}", sizes, dtype, itemsize))))
    return found
