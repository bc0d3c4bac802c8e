"""The device mesh: ordered axes with sizes, and the coordinate of each rank on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes, outermost first. Ranks count row-major: the last axis varies fastest.

    >>> Mesh({"pp": 2, "dp": 3}).coordinate(4)
    {'pp': 1, 'dp': 1}
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, axes: Mapping[str, int] | tuple[tuple[str, int], ...]) -> None:
        pairs = tuple(axes.items()) if isinstance(axes, Mapping) else tuple(axes)
        if len({name for name, _ in pairs}) != len(pairs):
            raise UsageError(f"mesh names an axis twice: {pairs}")
        if any(size < 1 for _, size in pairs):
            raise UsageError(f"mesh axes need a size of at least 1: {pairs}")
        object.__setattr__(self, "axes", pairs)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(size for _, size in self.axes)

    def __getitem__(self, axis: str) -> int:
        """Size of `axis`; an axis that the mesh does not name has size 1."""
        return dict(self.axes).get(axis, 1)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` by axis name."""
        if not 0 <= rank < self.size:
            raise UsageError(f"rank {rank} is not on a mesh of {self.size}")
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name, _ in self.axes}

    def rank(self, coordinate: Mapping[str, int]) -> int:
        """Rank at `coordinate`; axes left out count as 0."""
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinate.get(name, 0)
        return rank

    def coordinates(self) -> Iterator[dict[str, int]]:
        """All coordinates in rank order."""
        names = [name for name, _ in self.axes]
        for index in itertools.product(*(range(size) for _, size in self.axes)):
            yield dict(zip(names, index, strict=True))

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self.axes) or "1 rank"
