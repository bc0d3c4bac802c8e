"""Dealing the module's parameters to numbered groups, against an exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ucp.converters._numbered.infer import deal


def all_ways(candidates: list[int], groups: list[list[int]]) -> list[tuple[tuple[int, ...], ...]]:
    """Every way to give each group an increasing sequence of distinct candidates of its members' shapes."""
    found = []
    for choice in itertools.product(range(-1, len(groups)), repeat=len(candidates)):
        dealt = tuple(tuple(c for c, g in enumerate(choice) if g == group) for group in range(len(groups)))
        shapes = [[candidates[c] for c in members] for members in dealt]
        if shapes == groups:
            found.append(dealt)
    return found


@given(
    candidates=st.lists(st.integers(0, 2), max_size=6),
    groups=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=3),
)
def test_choices_are_those_of_an_exhaustive_search(candidates: list[int], groups: list[list[int]]) -> None:
    ways = all_ways(candidates, groups)
    dealt = deal(len(candidates), [len(g) for g in groups], lambda c, g, i: candidates[c] == groups[g][i])
    if not ways:
        assert dealt is None
        return
    assert dealt == tuple(
        tuple(tuple(sorted({way[g][i] for way in ways})) for i in range(len(group))) for g, group in enumerate(groups)
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 1)), max_size=12))
def test_a_real_assignment_is_always_among_the_choices(parameters: list[tuple[int, int]]) -> None:
    groups = [[shape for shape, owner in parameters if owner == g] for g in (0, 1)]
    truth = [[c for c, (_, owner) in enumerate(parameters) if owner == g] for g in (0, 1)]
    dealt = deal(len(parameters), [len(g) for g in groups], lambda c, g, i: parameters[c][0] == groups[g][i])
    assert dealt is not None
    assert all(c in dealt[g][i] for g in (0, 1) for i, c in enumerate(truth[g]))


def test_a_large_model_with_two_groups_is_dealt_at_once() -> None:
    block = [(9, 3), (9,), (3, 3), (3,), (3,), (5, 3), (5,), (3, 5), (3,)]
    shapes = [(50, 3), *(block * 300), (3,)]
    groups = [[s for s in shapes if len(s) == 2], [s for s in shapes if len(s) == 1]]
    dealt = deal(len(shapes), [len(g) for g in groups], lambda c, g, i: shapes[c] == groups[g][i])
    assert dealt is not None
    assert all(len(choices) == 1 for group in dealt for choices in group)


def test_too_many_ways_to_look_at_leave_every_choice_open() -> None:
    dealt = deal(601, [200, 200], lambda c, g, i: g == 0 or i < 199 or c == 600)
    assert dealt is not None
    assert all(len(choices) > 300 for group in dealt for choices in group[:199])
    assert dealt[1][199] == (600,)
