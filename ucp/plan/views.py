"""Views: the same elements of a tensor in the coordinates of finer or coarser factors.

Flat ranges mean the same in every view, since a view only splits dims. Boxes do not: a box of a view is several boxes
of a finer one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ucp.layout import Box, FlatRange, Shape, ravel, row_major_strides
from ucp.layout.block import View
from ucp.plan.fragment import Extent, Fragment

_Run = tuple[Shape, Shape, int, tuple[int, ...]]
"""Start and shape of a box of some factors, how many elements of the extent it begins at, and strides there."""


def refinement(a: View, b: View) -> View | None:
    """The coarsest view whose factors make up those of both, or None where there is none (3·8 against 4·6)."""
    groups = []
    for one, two in zip(a.factors, b.factors, strict=True):
        steps = sorted({*_inner(one), *_inner(two)})
        if 0 in steps or any(upper % lower for lower, upper in itertools.pairwise(steps)):
            return None
        groups.append(tuple(upper // lower for lower, upper in itertools.pairwise(steps))[::-1] or (1,))
    return View(tuple(groups))


def _inner(factors: Shape) -> Iterator[int]:
    """Numbers of elements of a dim below each factor, and of the whole dim."""
    return itertools.accumulate(reversed(factors), initial=1, func=lambda n, factor: n * factor)


def refined(fragment: Fragment, view: View, fine: View) -> list[Fragment]:
    """`fragment` of a tensor seen through `view` as fragments seen through `fine`, one of its refinements."""
    region, extent = fragment.region, fragment.extent
    if isinstance(region, FlatRange) or view.shape == fine.shape:
        return [fragment]
    runs: list[list[_Run]] = []
    at = 0
    for group, fine_group in zip(view.factors, fine.factors, strict=True):
        if not group:
            runs.append([((0,), (1,), 0, (0,))])
        for sizes in _split(group, fine_group):
            interval = FlatRange(region.start[at], region.shape[at])
            runs.append(list(_runs(interval, sizes, extent.strides[at])))
            at += 1
    return [_joined(fragment, combination) for combination in itertools.product(*runs)]


def _split(factors: Shape, fine: Shape) -> list[Shape]:
    """For each factor, the fine factors that make it up; factors of size 1 are anybody's."""
    found: list[Shape] = []
    rest = list(fine)
    for n in factors:
        taken: list[int] = []
        while rest and math.prod(taken) < n:
            taken.append(rest.pop(0))
        found.append(tuple(taken))
    if rest and found:
        found[-1] = (*found[-1], *rest)
    return found


def _runs(interval: FlatRange, sizes: Shape, stride: int) -> Iterator[_Run]:
    strides = tuple(step * stride for step in row_major_strides(sizes))
    for box in interval.boxes(sizes) if sizes else (Box((), ()),):
        skip = (ravel(box.start, sizes) - interval.start) * stride if sizes else 0
        yield box.start, box.shape, skip, strides


def _joined(fragment: Fragment, runs: tuple[_Run, ...]) -> Fragment:
    box = Box(tuple(a for run in runs for a in run[0]), tuple(n for run in runs for n in run[1]))
    old = fragment.extent
    offset = old.offset + sum(run[2] for run in runs) * old.itemsize
    extent = Extent(old.object, offset, box.shape, tuple(stride for run in runs for stride in run[3]), old.dtype)
    return replace(fragment, region=box, extent=extent)


def spelled_out(fragment: Fragment, view: View) -> list[Fragment]:
    """`fragment` of a tensor seen through `view` as boxes in the tensor's own dims, which may be many."""
    region, extent = fragment.region, fragment.extent
    if isinstance(region, FlatRange) or view.shape == view.tensor:
        return [fragment]
    runs: list[list[_Run]] = []
    at = 0
    for group in view.factors:
        box = Box(region.start[at : at + len(group)], region.shape[at : at + len(group)])
        runs.append(list(_plain_runs(group, box, extent.strides[at : at + len(group)])))
        at += len(group)
    return [_joined(fragment, combination) for combination in itertools.product(*runs)]


def _plain_runs(factors: Shape, box: Box, strides: tuple[int, ...]) -> Iterator[_Run]:
    """The intervals of one dim that a box of its factors is: runs along the innermost factor that has a size."""
    if not factors:
        yield (0,), (1,), 0, (0,)
        return
    along = max((i for i, n in enumerate(factors) if n > 1), default=0)
    counts = tuple(1 if i == along else n for i, n in enumerate(box.shape))
    for index in itertools.product(*(range(n) for n in counts)):
        first = ravel(tuple(a + i for a, i in zip(box.start, index, strict=True)), factors)
        skip = sum(i * stride for i, stride in zip(index, strides, strict=True))
        yield (first,), (box.shape[along],), skip, (strides[along],)
