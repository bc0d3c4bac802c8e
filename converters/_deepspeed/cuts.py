"""How tensor-parallel ranks hold one parameter: whole, or cut along one dim, as numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Run = tuple[int, int]
"""First index and number of indices."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Every rank holds all of it; with `mean` each its own, and the parameter is their mean. `rows` as in `Along`."""

    mean: bool = False
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Along:
    """Cut along `dim` of the tensor, which is ``outer * size * inner`` elements long over all ranks.

    `runs` are for each rank the indices that it holds out of `size`, in its own order. `rows`, for a vocabulary, is how
    many of the dim's indices are real; padding follows.
    """

    dim: int
    size: int
    runs: tuple[tuple[Run, ...], ...]
    outer: int = 1
    inner: int = 1
    rows: int | None = None

    @property
    def boundaries(self) -> tuple[int, ...] | None:
        """Where ranks begin, and the end, if each holds one contiguous piece in rank order; else None."""
        at = [0]
        for held in self.runs:
            joined = merged(held)
            if len(joined) > 1 or (joined and joined[0][0] != at[-1]):
                return None
            at.append(at[-1] + (joined[0][1] if joined else 0))
        return tuple(at) if at[-1] == self.size else None

    @property
    def parts(self) -> int | None:
        """Number of equal parts that are each cut alike in rank order; None where it is no such thing."""
        count = len(merged(self.runs[0]))
        if count < 2 or self.size % count:
            return None
        part = self.size // count
        for number in range(count):
            at = number * part
            for held in map(merged, self.runs):
                if len(held) != count or held[number][0] != at:
                    return None
                at += held[number][1]
            if at != (number + 1) * part:
                return None
        same = all(len({length for _, length in held}) == 1 for held in map(merged, self.runs))
        return count if same else None

    @property
    def unit(self) -> int:
        """The largest block of which every run is a whole number, from a whole number of blocks on."""
        return math.gcd(self.size, *(n for held in self.runs for run in held for n in run))


def merged(runs: Sequence[Run]) -> list[Run]:
    """The same indices in the same order, as few runs as possible."""
    found: list[Run] = []
    for start, length in runs:
        if not length:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def side_by_side(dim: int, widths: Sequence[int]) -> Along:
    """One contiguous piece per rank, of these widths."""
    return fused(dim, [widths])


def fused(dim: int, parts: Sequence[Sequence[int]], *, outer: int = 1, inner: int = 1) -> Along:
    """Parts one after the other, each cut in rank order into pieces of the given widths."""
    starts = list(accumulate((sum(widths) for widths in parts), initial=0))
    ranks = range(len(parts[0]))
    runs = tuple(
        tuple((start + sum(widths[:rank]), widths[rank]) for start, widths in zip(starts, parts, strict=False))
        for rank in ranks
    )
    return Along(dim, starts[-1], runs, outer, inner)


def covers(runs: Sequence[Sequence[Run]], size: int) -> bool:
    """Whether every index below `size` is held by some rank, and nothing beyond."""
    held = merged(sorted(run for rank in runs for run in rank if run[1]))
    end = 0
    for start, length in held:
        if start > end or start + length > size:
            return False
        end = max(end, start + length)
    return end == size


def disjoint(runs: Sequence[Run]) -> bool:
    """Whether no index is held twice by one rank."""
    ordered = sorted(run for run in runs if run[1])
    return all(start + length <= after for (start, length), (after, _) in pairwise(ordered))
