"""Which name a numbered optimizer parameter has, where only shapes tell.

torch numbers parameters group by group (torch/optim/optimizer.py, ``state_dict``). Groups are filled in the order of
the module, as every training script that loops over ``named_parameters`` does, so each group is a subsequence of the
module's parameters. What is sought is the one way to deal the module's parameters out to the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Matches = Callable[[int, int, int], bool]
"""Whether candidate `c` can be member `i` of group `g`: matches(c, g, i)."""

Position = tuple[int, ...]
"""How many members of each group were dealt."""

Layer = dict[Position, tuple[int, Position | None, int]]
"""Positions after some candidates: in how many ways (1 or 2), from which position, and to which group (-1 is none)."""

_MOST_STATES = 20_000


@dataclass(frozen=True, slots=True)
class Dealt:
    """`groups`: for each group, the candidates that are its members, in order. `ways` is 1, or 2 for more than one."""

    groups: tuple[tuple[int, ...], ...]
    ways: int


def deal(candidates: int, sizes: Sequence[int], matches: Matches) -> Dealt | None:
    """Deal `candidates` in order to groups of `sizes`; those that no group takes are left out. None if none can be.

    With more ways than one, `groups` is one of them. `ways` is 2 as well where there are too many to look at.
    """
    earliest, latest = _bounds(candidates, sizes, matches)
    if earliest is None or latest is None:
        return None
    layers: list[Layer] = [{(0,) * len(sizes): (1, None, -1)}]
    for c in range(candidates):
        following: Layer = {}
        for position, (ways, _, _) in layers[-1].items():
            for g in [-1, *range(len(sizes))]:
                after = _advance(position, g)
                if g >= 0 and not _may_take(c, g, position[g], sizes, earliest, latest, matches):
                    continue
                if _too_late(c + 1, after, sizes, latest):
                    continue
                known = following.get(after)
                total = min(2, ways + (known[0] if known else 0))
                following[after] = (total, known[1], known[2]) if known else (total, position, g)
        if len(following) > _MOST_STATES:
            return Dealt(earliest_groups(earliest), 2)
        layers.append(following)
    end = tuple(sizes)
    if end not in layers[-1]:
        return None
    return Dealt(_trace(layers, end, len(sizes)), layers[-1][end][0])


def earliest_groups(earliest: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Each group's members at the first place they fit."""
    return tuple(tuple(group) for group in earliest)


def _bounds(
    candidates: int, sizes: Sequence[int], matches: Matches
) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """First and last candidate that each member can be, each group looked at alone."""
    earliest, latest = [], []
    for g, size in enumerate(sizes):
        first = _greedy(range(candidates), range(size), g, matches)
        last = _greedy(range(candidates - 1, -1, -1), range(size - 1, -1, -1), g, matches)
        if first is None or last is None:
            return None, None
        earliest.append(first)
        latest.append(last[::-1])
    return earliest, latest


def _greedy(candidates: Sequence[int], members: Sequence[int], g: int, matches: Matches) -> list[int] | None:
    found: list[int] = []
    at = iter(candidates)
    for i in members:
        hit = next((c for c in at if matches(c, g, i)), None)
        if hit is None:
            return None
        found.append(hit)
    return found


def _advance(position: tuple[int, ...], g: int) -> tuple[int, ...]:
    return position if g < 0 else (*position[:g], position[g] + 1, *position[g + 1 :])


def _may_take(
    c: int,
    g: int,
    i: int,
    sizes: Sequence[int],
    earliest: Sequence[Sequence[int]],
    latest: Sequence[Sequence[int]],
    matches: Matches,
) -> bool:
    return i < sizes[g] and earliest[g][i] <= c <= latest[g][i] and matches(c, g, i)


def _too_late(c: int, position: tuple[int, ...], sizes: Sequence[int], latest: Sequence[Sequence[int]]) -> bool:
    """Whether some group's next member had to be one of the candidates before `c`."""
    return any(i < size and latest[g][i] < c for g, (i, size) in enumerate(zip(position, sizes, strict=True)))


def _trace(layers: Sequence[Layer], end: Position, count: int) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = [[] for _ in range(count)]
    position: Position | None = end
    for c in range(len(layers) - 1, 0, -1):
        assert position is not None
        _, before, g = layers[c][position]
        if g >= 0:
            groups[g].append(c - 1)
        position = before
    return tuple(tuple(reversed(group)) for group in groups)
