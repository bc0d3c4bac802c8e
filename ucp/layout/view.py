"""Views of one tensor that differ: a common one, and blocks and boxes restated in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ucp.layout.block import NO_STEP, Block, View
from ucp.layout.interval import Span, boxes_between
from ucp.layout.region import Box, Shape, numel, row_major_strides


def refine(a: View, b: View) -> View | None:
    """The coarsest view that both can be restated in; None where their factors do not divide each other.

    Factors of length 1 are dropped, but each dim has one: ``((4, 6),)`` and ``((2, 12),)`` give ``((2, 2, 6),)``.
    """
    assert a.tensor == b.tensor, "views of different tensors"
    dims = []
    for size, first, second in zip(a.tensor, a.factors, b.factors, strict=True):
        found = _factors(size, _strides(first) | _strides(second))
        if found is None:
            return None
        dims.append(found)
    return View(tuple(dims))


def coarsen(a: View, b: View) -> View:
    """The finest view that blocks of both can be `spread` to.

    ``((2, 2, 6),)`` and ``((4, 3, 2),)`` give ``((4, 6),)``.
    """
    assert a.tensor == b.tensor, "views of different tensors"
    dims = []
    for size, first, second in zip(a.tensor, a.factors, b.factors, strict=True):
        found = _factors(size, _strides(first) & _strides(second))
        assert found is not None, "strides of one view divide each other"
        dims.append(found)
    return View(tuple(dims))


def restate(block: Block, view: View, to: View) -> list[Block]:
    """`block`, given in `view`, as blocks of the finer view `to` with the same elements at the same places.

    An interval of a factor that `to` splits in k becomes at most 2·k-1 boxes.
    """
    if not block.size:
        return []
    options = []
    for span, step, sizes in zip(_spans(block), block.steps, _groups(view, to), strict=True):
        options.append(list(_split(span, step, sizes)))
    return [_block(block.start, parts) for parts in itertools.product(*options)]


def in_view(box: Box, view: View, to: View) -> list[Block]:
    """`box` of the coarser `view` of a tensor (``View.plain(shape)``: the tensor itself) as boxes of the finer `to`.

    Each comes as a block whose "shard" is the tensor in the coordinates of `view`: `start` is its first element there,
    and one step along factor i of `to` moves ``steps[i] = (factor of view, stride)`` there. So in an array that holds
    `box`, it lies where ``linear(block, strides of the array)`` says, less the place of ``box.start``.
    """
    steps = tuple((i, 1) if n > 1 else NO_STEP for i, n in enumerate(box.shape))
    return restate(Block(box, box.start, steps), view, to)


def spread(block: Block, view: View, to: View) -> Iterator[Block]:
    """`block`, given in `view`, as blocks of the coarser view `to`: one for each run that stays evenly apart.

    These can be as many as the block has elements. It serves views that have no common refinement.
    """
    if not block.size:
        return
    options, spans, steps = [], _spans(block), block.steps
    for sizes in _groups(to, view):
        count = len(sizes)
        options.append(list(_runs(spans[:count], steps[:count], sizes)))
        spans, steps = spans[count:], steps[count:]
    for parts in itertools.product(*options):
        yield _block(block.start, parts)


class _Part(NamedTuple):
    """What one factor of the old view becomes: spans and steps of factors of the new one."""

    spans: tuple[Span, ...]
    steps: tuple[tuple[int, int], ...]
    moves: tuple[tuple[int, int], ...]
    """By how much the start moves: (dim of the shard, elements)."""


def _block(start: Shape, parts: Iterable[_Part]) -> Block:
    at = list(start)
    spans: list[Span] = []
    steps: list[tuple[int, int]] = []
    for part in parts:
        spans += part.spans
        steps += part.steps
        for dim, by in part.moves:
            at[dim] += by
    box = Box(tuple(first for first, _ in spans), tuple(count for _, count in spans))
    return Block(box, tuple(at), tuple(steps))


def _spans(block: Block) -> list[Span]:
    return list(zip(block.box.start, block.box.shape, strict=True))


def _split(span: Span, step: tuple[int, int], sizes: Shape) -> Iterator[_Part]:
    """An interval of a factor as boxes of the finer factors `sizes`."""
    first, count = span
    dim, stride = step
    finer = row_major_strides(sizes)
    for spans in boxes_between(list(zip(finer, sizes, strict=True)), first, first + count):
        moved = sum(a * s for (a, _), s in zip(spans, finer, strict=True)) - first
        steps = tuple((dim, stride * s) if n > 1 else NO_STEP for (_, n), s in zip(spans, finer, strict=True))
        yield _Part(spans, steps, ((dim, moved * stride),) if moved else ())


def _runs(spans: Sequence[Span], steps: Sequence[tuple[int, int]], sizes: Shape) -> Iterator[_Part]:
    """A box of finer factors as intervals of the coarser one they make up."""
    inner = _fused(spans, steps, sizes)
    finer = row_major_strides(sizes)
    run = numel(tuple(count for _, count in spans[inner:]))
    step = next((step for step in reversed(steps[inner:]) if step != NO_STEP), NO_STEP)
    origin = sum(first * stride for (first, _), stride in zip(spans, finer, strict=True))
    for index in itertools.product(*(range(count) for _, count in spans[:inner])):
        start = origin + sum(i * stride for i, stride in zip(index, finer, strict=False))
        moves = tuple((dim, i * stride) for i, (dim, stride) in zip(index, steps, strict=False) if i)
        yield _Part(((start, run),), (step,), moves)


def _fused(spans: Sequence[Span], steps: Sequence[tuple[int, int]], sizes: Shape) -> int:
    """First of the inner factors whose box is one run of the coarser factor, evenly apart in the shard."""
    known: tuple[int, int] | None = None
    length = 1
    for i in range(len(sizes) - 1, -1, -1):
        if spans[i][1] > 1:
            if known is not None and steps[i] != (known[0], known[1] * length):
                return i + 1
            known = known or steps[i]
            length *= spans[i][1]
        if spans[i][1] < sizes[i]:
            # Outer factors may only stand still: the next index of one would leave a gap.
            return _still(spans, i)
    return 0


def _still(spans: Sequence[Span], i: int) -> int:
    while i and spans[i - 1][1] == 1:
        i -= 1
    return i


def _strides(sizes: Shape) -> frozenset[int]:
    """Strides of the factors and the size of them all: where a dim may be split."""
    return frozenset((*row_major_strides(sizes), numel(sizes), 1))


def _factors(size: int, strides: frozenset[int]) -> Shape | None:
    """Factors of a dim of `size` with these strides, outer to inner; None where one does not divide the next."""
    if size < 2:
        return (size,)
    order = sorted(strides, reverse=True)
    if any(a % b for a, b in pairwise(order)):
        return None
    return tuple(a // b for a, b in pairwise(order))


def _groups(coarse: View, fine: View) -> list[Shape]:
    """For each factor of `coarse` the factors of `fine` that make it up."""
    found: list[Shape] = []
    for outer, inner in zip(coarse.factors, fine.factors, strict=True):
        rest = list(inner)
        for size in outer:
            group: list[int] = []
            while numel(tuple(group)) != size:
                assert rest, "one view is no refinement of the other"
                group.append(rest.pop(0))
            found.append(tuple(group))
        assert numel(tuple(rest)) == 1, "one view is no refinement of the other"
        if found:
            found[-1] = (*found[-1], *rest)
    return found
