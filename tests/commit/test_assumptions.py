"""What the protocol needs: conditional puts where there are several writers, and no clocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from unittest import mock

import pytest

from tests.commit.crashing import exhaust
from tests.commit.places import FsspecPlace
from tests.commit.scenes import scenes
from tests.commit.schedule import Stage, explore
from tests.commit.stories import stories
from ucp.store.errors import exists_already, replaced_meanwhile
from ucp.testing.watched import Around

SCENES = scenes()
STORIES = {story.name: story for story in stories()}


class Unconditional(Around):
    """Looks first and puts then, as a client must where a store lacks conditional puts."""

    def put(self, path, data, *, if_absent=False, if_match=None, durable=True):
        if if_absent and self.exists(path):
            raise exists_already(path)
        if if_match is not None and not (self.exists(path) and self.entry(path).fingerprint == if_match):
            raise replaced_meanwhile(path)
        super().put(path, data)

    def child(self, path):
        return Unconditional(self.inner.child(path))


def test_the_search_finds_what_it_is_for() -> None:
    """Were the claim not looked behind, one of two writers would write into the other's checkpoint."""
    with (
        mock.patch("ucp.testing.faults._Faulty.exists", return_value=False, create=True),
        pytest.raises(AssertionError, match="is not whole"),
    ):
        explore(Stage(SCENES["two conversions"]), switches=1)


@pytest.fixture
def mad_clocks() -> Iterator[None]:
    """Clocks of which none agrees with another one, nor with itself."""
    source = random.Random(0)
    with (
        mock.patch("time.time", source.random),
        mock.patch("time.monotonic", source.random),
        mock.patch("time.perf_counter", source.random),
    ):
        yield


@pytest.mark.parametrize("name", ["two overwrite", "two saves overwrite", "taken over from a zombie"])
def test_no_clock_is_asked(mad_clocks: None, name: str) -> None:
    assert explore(Stage(SCENES[name]), switches=1) > 5


@pytest.mark.parametrize("name", ["convert --overwrite", "save over"])
def test_one_writer_needs_no_conditions(name: str) -> None:
    """Any protocol of fsspec: one writer at a time loses nothing, whatever becomes of it."""
    with closing(FsspecPlace()) as place:
        assert not place.store.conditional
        tally = exhaust(STORIES[name], place, ("before",), only=("close", "put", "delete"))
    assert tally.points["before"] > 2


def test_two_writers_need_conditions() -> None:
    """On a store without them, two writers at once are the user's affair: what one has made, the other spoils."""
    with pytest.raises(AssertionError):
        explore(Stage(SCENES["two conversions"], Unconditional), switches=2)
