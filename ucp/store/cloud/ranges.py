"""Which requests fetch which ranges: neighbours together, large ones in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PART_BYTES = 8 << 20
"""Most bytes per request; eight such at once were as fast as larger ones on the servers that were measured."""

FREE_BYTES = 16 << 10
"""Bytes between two ranges that cost less than a request of their own, wherever the server is."""

GAP_BYTES = 256 << 10
"""Most bytes between two ranges that are read and thrown away."""

OVER_READ = 4
"""At most one part in so many of a request is thrown away, but for gaps of `FREE_BYTES`."""

Range = tuple[int, memoryview]
"""Where in the object, and the buffer to fill from there."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request, from byte `start` to `stop`, and the ranges that its answer fills."""

    start: int
    stop: int
    ranges: tuple[Range, ...]

    @property
    def direct(self) -> bool:
        """Whether the answer is just what one buffer wants."""
        return len(self.ranges) == 1


def fetches(ranges: Sequence[Range]) -> list[Fetch]:
    """The requests that fill `ranges`, in any order; ranges may overlap, empty ones are left out."""
    found: list[Fetch] = []
    group: list[Range] = []
    start = stop = wasted = 0
    for offset, buffer in sorted(_parts(ranges), key=lambda entry: entry[0]):
        gap, end = offset - stop, offset + len(buffer)
        if group and _together(gap, wasted, max(stop, end) - start):
            wasted += max(gap, 0)
        else:
            if group:
                found.append(Fetch(start, stop, tuple(group)))
            group, start, stop, wasted = [], offset, offset, 0
        group.append((offset, buffer))
        stop = max(stop, end)
    if group:
        found.append(Fetch(start, stop, tuple(group)))
    return found


def _together(gap: int, wasted: int, length: int) -> bool:
    """Whether a range `gap` bytes behind a request of which `wasted` are not wanted joins it, `length` bytes then."""
    if length > PART_BYTES or gap > GAP_BYTES:
        return False
    return gap <= FREE_BYTES or (wasted + gap) * OVER_READ <= length


def _parts(ranges: Sequence[Range]) -> Iterator[Range]:
    """`ranges` with those that are larger than a part cut in equal parts."""
    for offset, buffer in ranges:
        count = -(-len(buffer) // PART_BYTES)
        step = -(-len(buffer) // count) if count else 1
        for at in range(0, len(buffer), step):
            yield offset + at, buffer[at : at + step]
