"""Writers disturbed at every operation: what opens is the old or the new one, and a second run finishes it."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.commit import keeping, stories
from tests.commit.crashing import CHANGES, Kind, Story, exhaust
from tests.commit.places import LocalPlace, ObjectPlace, Place

WRITING, KEEPING = stories.stories(), keeping.stories()
VISIBLE = ("close", "put", "delete")
"""Operations that change something on a store whose writers show all at once."""


@pytest.mark.parametrize("story", [*WRITING, *KEEPING], ids=lambda story: story.name)
def test_killed_at_every_change_of_objects(story: Story) -> None:
    with closing(ObjectPlace()) as place:
        tally = exhaust(story, place, ("before",), only=VISIBLE)
    assert tally.points["before"] >= tally.states >= 1


@pytest.mark.parametrize("story", WRITING, ids=lambda story: story.name)
def test_killed_in_the_middle_of_files(story: Story) -> None:
    with closing(LocalPlace()) as place:
        assert exhaust(story, place, ("torn",), only=CHANGES).points["torn"] > 2


@pytest.mark.parametrize("kind", ["error", "lost"])
def test_a_put_fails_or_its_answer_is_lost(kind: Kind) -> None:
    with closing(ObjectPlace()) as place:
        assert exhaust(WRITING[1], place, (kind,), only=("put",)).points[kind] > 5


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("story", [*WRITING, *KEEPING], ids=lambda story: story.name)
@pytest.mark.parametrize("place", [LocalPlace, ObjectPlace], ids=lambda made: made.name)
def test_at_every_operation(place: type[Place], story: Story) -> None:
    with closing(place()) as made:
        tally = exhaust(story, made)
    assert tally.points["before"] == tally.points["after"] == tally.points["error"] > 10
