"""Saves of several ranks: whichever of them dies, and when, the old or the new checkpoint is there."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.commit.places import LocalPlace, ObjectPlace
from tests.commit.ranks import exhaust

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("old", [None, 1], ids=["new", "over"])
@pytest.mark.parametrize("form", ["native", "universal"])
@pytest.mark.parametrize("place", [LocalPlace, ObjectPlace], ids=lambda made: made.name)
def test_two_ranks(place, form: str, old: int | None) -> None:
    with closing(place()) as made:
        tally = exhaust(2, made, form=form, old=old)
    assert tally.points["rank 0 before"] > 5
    assert tally.points["rank 1 before"] > 3


def test_three_ranks() -> None:
    with closing(LocalPlace()) as made:
        tally = exhaust(3, made, form="native", old=1, step=2)
    assert {"rank 0 before", "rank 1 before", "rank 2 before"} <= tally.points.keys()
