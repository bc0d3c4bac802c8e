"""The verdict: no wrong loss slips through, whatever kind of number it is."""

from __future__ import annotations

import math

import pytest

from ucp.demo import TOLERANCE, Curve, Outcome
from ucp.demo.model import GLOBAL_BATCH, local_batch

WHOLE = (4.0, 3.0, 2.0, 1.0)


def outcome(*resumed: tuple[float, ...], whole: tuple[float, ...] = WHOLE) -> Outcome:
    curves = tuple(Curve(f"run {number}", 2, losses) for number, losses in enumerate(resumed))
    return Outcome("fsdp2", 2, Curve("whole", 0, whole), curves)


def test_equal_losses_hold() -> None:
    found = outcome((2.0, 1.0), (2.0, 1.0))
    assert (found.largest_difference, found.held) == (0.0, True)


def test_the_largest_difference_is_relative_and_over_all_runs_and_steps() -> None:
    found = outcome((2.0, 1.0), (2.2, 1.05), (2.0, 0.7))
    assert [found.difference(step) for step in (2, 3)] == pytest.approx([0.1, 0.3])
    assert found.largest_difference == pytest.approx(0.3)
    assert not found.held


def test_rounding_holds_and_little_more_does_not() -> None:
    assert outcome((2.0 * (1 + 0.9 * TOLERANCE), 1.0)).held
    assert not outcome((2.0 * (1 + 1.1 * TOLERANCE), 1.0)).held


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_loss_that_is_no_number_never_holds(bad, place) -> None:
    runs = [[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
    runs[place][1] = bad
    assert not outcome(*map(tuple, runs)).held
    assert outcome(*map(tuple, runs)).largest_difference == math.inf
    assert not outcome((2.0, bad), whole=(4.0, 3.0, 2.0, bad)).held


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_see_one_batch_whatever_their_number(world) -> None:
    parts = [local_batch(5, rank=rank, world=world) for rank in range(world)]
    whole = local_batch(5, rank=0, world=1)
    for i in range(2):
        rows = [row.tolist() for part in parts for row in part[i]]
        assert rows == whole[i].tolist()
        assert len(rows) == GLOBAL_BATCH
