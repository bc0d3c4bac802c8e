"""Intervals of composed dims: where positions ``sum(index * stride)`` lie between two bounds, as boxes of indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Span = tuple[int, int]
"""First index and count along one factor."""


def boxes_between(factors: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[tuple[Span, ...]]:
    """Boxes of indices whose positions lie in [low, high), in order of position; at most 2·n-1 of them.

    `factors` are (stride, count) outer to inner. They must be nested: one step along a factor leads past everything
    inside it, as in any composed dim. The stride of a factor of count 1 does not matter.
    """
    if not factors:
        if low <= 0 < high:
            yield ()
        return
    (stride, count), inner = factors[0], factors[1:]
    if count == 1:
        for rest in boxes_between(inner, low, high):
            yield ((0, 1), *rest)
        return
    reach = 1 + sum(step * (n - 1) for step, n in inner)
    assert stride >= reach, "factors are not nested"
    first, last = max(0, (low - reach) // stride + 1), min(count - 1, (high - 1) // stride)
    if first <= last and not low <= first * stride <= high - reach:
        yield from _row(inner, first, stride, low, high)
        first += 1
    partial = first <= last and last * stride > high - reach
    stop = last if partial else last + 1
    if first < stop:
        yield ((first, stop - first), *((0, n) for _, n in inner))
    if partial:
        yield from _row(inner, last, stride, low, high)


def _row(inner: Sequence[tuple[int, int]], index: int, stride: int, low: int, high: int) -> Iterator[tuple[Span, ...]]:
    for rest in boxes_between(inner, low - index * stride, high - index * stride):
        yield ((index, 1), *rest)
