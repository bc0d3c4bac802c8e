"""Which name a numbered optimizer parameter has, where only shapes tell.

torch numbers parameters group by group (torch/optim/optimizer.py, ``state_dict``). Groups are filled in the order of
the module, as every training script that loops over ``named_parameters`` does, so each group is a subsequence of the
module's parameters. What is sought is what all ways to deal the module's parameters out to the groups have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Matches = Callable[[int, int, int], bool]
"""Whether candidate `c` can be member `i` of group `g`: matches(c, g, i)."""

Choices = tuple[tuple[tuple[int, ...], ...], ...]
"""For each member of each group, the candidates that it can be; one where there is no doubt."""

Position = tuple[int, ...]
"""How many members of each group were dealt."""

Windows = Sequence[Sequence[range]]
"""For each member of each group, from the first to the last candidate that it can be."""

_MOST_STATES = 4_000


def deal(candidates: int, sizes: Sequence[int], matches: Matches) -> Choices | None:
    """Deal `candidates` in order to groups of `sizes`, in all ways; those that no group takes are left out.

    Gives the candidates that each member is in some way, None if there is no way. Where there are too many ways to look
    at, more candidates than that may be given, and never fewer.
    """
    windows = _windows(candidates, sizes, matches)
    if windows is None:
        return None
    layers = [{(0,) * len(sizes)}]
    for c in range(candidates):
        layers.append({after for at in layers[-1] for _, after in _steps(c, at, windows, matches)})
        if len(layers[-1]) > _MOST_STATES:
            return tuple(
                tuple(tuple(c for c in window if matches(c, g, i)) for i, window in enumerate(group))
                for g, group in enumerate(windows)
            )
    end = tuple(sizes)
    return _trace(layers, end, windows, matches) if end in layers[-1] else None


def _windows(candidates: int, sizes: Sequence[int], matches: Matches) -> Windows | None:
    """Each group looked at alone; None if one of them cannot be dealt."""
    windows = []
    for g, size in enumerate(sizes):
        first = _greedy(range(candidates), range(size), g, matches)
        last = _greedy(range(candidates - 1, -1, -1), range(size - 1, -1, -1), g, matches)
        if first is None or last is None:
            return None
        windows.append([range(a, b + 1) for a, b in zip(first, reversed(last), strict=True)])
    return windows


def _greedy(candidates: Sequence[int], members: Sequence[int], g: int, matches: Matches) -> list[int] | None:
    found: list[int] = []
    at = iter(candidates)
    for i in members:
        hit = next((c for c in at if matches(c, g, i)), None)
        if hit is None:
            return None
        found.append(hit)
    return found


def _steps(c: int, at: Position, windows: Windows, matches: Matches) -> Iterator[tuple[int, Position]]:
    """(group, position after) for every way to deal candidate `c` at a position; group -1 takes none.

    Without positions where some group's next member had to be `c` or an earlier one.
    """
    due = [g for g, i in enumerate(at) if i < len(windows[g]) and windows[g][i][-1] == c]
    if not due:
        yield -1, at
    for g, i in enumerate(at):
        if due not in ([], [g]) or i >= len(windows[g]) or c not in windows[g][i] or not matches(c, g, i):
            continue
        yield g, (*at[:g], i + 1, *at[g + 1 :])


def _trace(layers: Sequence[set[Position]], end: Position, windows: Windows, matches: Matches) -> Choices:
    """What each member is on any of the ways that lead to `end`."""
    found: list[list[list[int]]] = [[[] for _ in group] for group in windows]
    alive = {end}
    for c in range(len(layers) - 2, -1, -1):
        before: set[Position] = set()
        taken: set[tuple[int, int]] = set()
        for at in layers[c]:
            for g, after in _steps(c, at, windows, matches):
                if after in alive:
                    before.add(at)
                    taken.add((g, at[g] if g >= 0 else 0))
        for g, i in taken:
            if g >= 0:
                found[g][i].append(c)
        alive = before
    return tuple(tuple(tuple(reversed(choices)) for choices in group) for group in found)
