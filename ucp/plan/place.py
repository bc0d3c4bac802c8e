"""Placing: block copies into a dense array, as fragments of the tensor that the array is.

The inverse of composing. What is copied into a buffer could be read from where it comes from just as well: each copy is
a fragment of the buffer's tensor, a box in a view of it or a flat range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.layout import Box, FlatRange, Shape, boxes, row_major_strides, unravel
from ucp.layout.block import View
from ucp.plan.fragment import ZEROS, Copy, Extent, Fragment
from ucp.plan.views import refined, refinement, spelled_out


@dataclass(frozen=True, slots=True)
class Laid:
    """A fragment of a tensor whose box, if it is one, is in the coordinates of `view`."""

    fragment: Fragment
    view: View


def placed(copy: Copy, shape: Shape, *, replica: int = 0, term: int = 0) -> Iterator[Laid]:
    """`copy` into a dense array of `shape` as fragments of it, few where the steps of the copy divide its dims."""
    source, target = copy.source, copy.target
    if not target.size:
        return
    first = target.offset // target.itemsize
    dims = [i for i, n in enumerate(target.shape) if n > 1]
    if len(dims) <= 1 and all(target.strides[i] == 1 for i in dims):
        region = FlatRange(first, target.size)
        steps = tuple(source.strides[i] for i in dims) or (1,)
        yield Laid(Fragment(region, _extent(source, (target.size,), steps), replica, term), View.plain(shape))
        return
    dims.sort(key=lambda i: -target.strides[i])
    found = _view(shape, first, [(target.strides[i], target.shape[i]) for i in dims])
    if found is None:
        for part in _singles(copy, dims[0]):
            yield from placed(part, shape, replica=replica, term=term)
        return
    view, box, homes = found
    strides = [0] * len(box.shape)
    for i, home in zip(dims, homes, strict=True):
        strides[home] = source.strides[i]
    yield Laid(Fragment(box, _extent(source, box.shape, tuple(strides)), replica, term), view)


def _extent(source: Extent, shape: Shape, strides: tuple[int, ...]) -> Extent:
    return Extent(source.object, source.offset, shape, strides, source.dtype)


def _singles(copy: Copy, dim: int) -> Iterator[Copy]:
    """The copy cut into single indices along `dim`."""
    shape = copy.target.shape
    for index in range(shape[dim]):
        box = Box(
            tuple(index if d == dim else 0 for d in range(len(shape))),
            tuple(1 if d == dim else n for d, n in enumerate(shape)),
        )
        yield Copy(copy.source.sub(box), copy.target.sub(box))


def _view(shape: Shape, first: int, steps: Sequence[tuple[int, int]]) -> tuple[View, Box, list[int]] | None:
    """A view of `shape` in which (stride, count) `steps` from element `first` on are a box, and the factor of each.

    None where there is none.
    """
    start, below = unravel(first, shape), row_major_strides(shape)
    factors: list[Shape] = []
    begin: list[int] = []
    counts: list[int] = []
    homes: list[int] = []
    for d, n in enumerate(shape):
        own = [(stride // below[d], count) for stride, count in steps if below[d] <= stride < below[d] * n]
        split = _split(n, start[d], own)
        if split is None:
            return None
        homes += [len(begin) + i for i in range(len(own))]
        factors.append(split[0])
        begin += split[1]
        counts += [count for _, count in own] + [1] * (len(split[0]) - len(own))
    if len(homes) != len(steps):
        return None
    return View(tuple(factors)), Box(tuple(begin), tuple(counts)), homes


def _split(n: int, start: int, steps: Sequence[tuple[int, int]]) -> tuple[Shape, Shape] | None:
    """Factors of a dim of length `n` such that each step, outer to inner, is along one, and the start along each."""
    factors: list[int] = []
    whole = n
    for step, _ in steps:
        if whole % step or step >= whole:
            return None
        factors.append(whole // step)
        whole = step
    if whole > 1 or not steps:
        factors.append(whole)
    begin = unravel(start, tuple(factors))
    if any(a + count > factor for a, (_, count), factor in zip(begin, steps, factors, strict=False)):
        return None
    return tuple(factors), begin


def in_one_view(groups: Sequence[Sequence[Laid]], shape: Shape) -> tuple[View, list[list[Fragment]]]:
    """The fragments of each of `groups`, all of a tensor of `shape`, in the coordinates of one view.

    They may be many where no view suits all.
    """
    common: View | None = View.plain(shape)
    for view in dict.fromkeys(laid.view for group in groups for laid in group):
        common = refinement(common, view) if common else None
    if common is None:
        return View.plain(shape), [
            [f for one in group for f in spelled_out(one.fragment, one.view)] for group in groups
        ]
    return common, [[f for one in group for f in refined(one.fragment, one.view, common)] for group in groups]


def padded(fragments: Sequence[Fragment], view: View, dtype: str) -> Iterator[Fragment]:
    """`fragments`, and zeros for the elements of which they hold no primary copy, in each term if there are several."""
    yield from fragments
    for term in {fragment.term for fragment in fragments} or {0}:
        held = [fragment for fragment in fragments if fragment.term == term and not fragment.replica]
        left = [Box.whole(view.shape)]
        if sum(fragment.region.size for fragment in held) < left[0].size:
            for hole in (box for fragment in held for box in boxes(fragment.region, view.shape)):
                left = [rest for one in left for rest in _without(one, hole)]
            for box in left:
                yield Fragment(box, Extent.contiguous(ZEROS, 0, box.shape, dtype), 0, term)


def _without(whole: Box, hole: Box) -> Iterator[Box]:
    """The boxes that are left of `whole` without `hole`."""
    met = whole.intersect(hole)
    if met is None:
        if whole.size:
            yield whole
        return
    start, stop = list(whole.start), list(whole.stop)
    for d in range(len(start)):
        for low, high in ((start[d], met.start[d]), (met.stop[d], stop[d])):
            if low < high:
                begin, end = [*start[:d], low, *start[d + 1 :]], [*stop[:d], high, *stop[d + 1 :]]
                yield Box(tuple(begin), tuple(b - a for a, b in zip(begin, end, strict=True)))
        start[d], stop[d] = met.start[d], met.stop[d]
