"""A watcher killed at any operation: what is published is always there and whole, and the next one ends the work."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from unittest import mock

import pytest

from tests.commit.crashing import named
from tests.commit.places import LocalPlace, ObjectPlace, Place, State
from tests.pipeline import scene
from ucp.errors import StorageError
from ucp.store import open_store
from ucp.testing.faults import Failing, Fault, How, crash, placed

EACH = pytest.mark.parametrize(
    "step", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive], id="each"), pytest.param(7, id="some")]
)
"""Every operation in the long run of the tests, every seventh in the short one."""

SOURCE, DESTINATION = "placed://source/run", "placed://place/out"


@pytest.fixture(params=[LocalPlace, ObjectPlace], ids=["local", "objects"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    made: Place = request.param()
    yield made
    made.close()


@pytest.fixture
def source() -> Iterator[LocalPlace]:
    """Two steps, the second of which has just come."""
    made = LocalPlace()
    with placed(source=made.store):
        scene.save(SOURCE, 1)
    yield made
    made.close()


def one_pass() -> None:
    outcome = scene.watch(SOURCE, DESTINATION, keep=1)
    assert not outcome.failed, outcome.failed
    assert not outcome.busy


def is_published() -> int:
    """The step that the pointer names, which is there: its root is the very one that was verified."""
    said = scene.published(DESTINATION)
    assert said is not None
    root = open_store(f"{DESTINATION}/{said['name']}").read(said["root"])
    assert said["digest"] == f"sha256:{hashlib.sha256(root).hexdigest()}"
    scene.check(DESTINATION, said["step"])
    return said["step"]


class Trial:
    """A pass in which step 2 takes the place of step 1, from the same start again and again."""

    def __init__(self, source: LocalPlace, place: Place) -> None:
        self.source, self.place = source, place
        with placed(source=source.store, place=place.store), named("before"):
            one_pass()
            assert is_published() == 1
            scene.save(SOURCE, 2)
        self.start = place.state()
        run = crash(self.work)
        assert not run.error, run.error
        self.operations = run.operations
        self.end = self.state()
        assert {name.split("/")[1] for name in self.end} == {".ucp-watch", "latest.json", "step-2"}

    def work(self, fault: Fault) -> None:
        # As many operations each time, however long it takes.
        steady = mock.patch("ucp.run.convert._FLUSH_SECONDS", float("inf"))
        with steady, placed(source=self.source.store, place=fault.around(self.place.store)), named("work"):
            one_pass()

    def state(self) -> State:
        return {name: data for name, data in self.place.state().items() if not name.endswith("/")}

    def kill(self, at: int, how: How) -> None:
        self.place.put_back(self.start)
        died = crash(self.work, at=at, how=how)
        if how == "after" and died.at is None:
            return  # a put that was refused is not survived by anything
        assert died.at is not None, died
        with placed(source=self.source.store, place=self.place.store), named("work"):
            left = is_published()
            one_pass()
            assert is_published() == 2 >= left
        assert self.state() == self.end, f"{died}; left step {left}"


@EACH
def test_killed_at_any_operation_the_next_pass_ends_in_the_same_state(source, place, step):
    # Times are the same in all runs: marks and leases hold some. A pass removes at once what it marks.
    with mock.patch("time.time", return_value=1e9):
        trial = Trial(source, place)
        for operation in trial.operations[::step]:
            trial.kill(operation.number, "before")
    assert len(trial.operations) > 80


@EACH
def test_killed_in_the_middle_of_a_put_or_of_several_runs(source, place, step):
    with mock.patch("time.time", return_value=1e9):
        trial = Trial(source, place)
        for operation in [one for one in trial.operations if one.name in ("put", "write_at")][::step]:
            trial.kill(operation.number, "torn" if isinstance(place, LocalPlace) else "after")
        choose = random.Random(5)
        for _ in range(5 if step == 1 else 1):
            trial.place.put_back(trial.start)
            while (died := crash(trial.work, at=choose.randint(1, 70))).at is not None:
                with placed(source=source.store, place=place.store):
                    is_published()
            assert not died.error, died.error
            assert trial.state() == trial.end


@EACH
def test_what_failed_for_the_moment_is_done_in_the_next_pass(source, place, step):
    """An error of storage at any operation ends the pass, or this checkpoint's part of it, and is not remembered."""
    with mock.patch("time.time", return_value=1e9):
        trial = Trial(source, place)
        for operation in trial.operations[::step]:
            trial.place.put_back(trial.start)
            failing = Failing(place.store, at=operation.number)
            with placed(source=source.store, place=failing), named("work"):
                try:
                    outcome = scene.watch(SOURCE, DESTINATION, keep=1)
                    assert all(failure.code == "storage" for failure in outcome.failed), outcome.failed
                except StorageError:
                    pass
            with placed(source=source.store, place=place.store), named("work"):
                is_published()
                one_pass()
                assert is_published() == 2
            assert json.loads(trial.state()["out/latest.json"])["step"] == 2
