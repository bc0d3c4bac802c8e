"""The collector among writers, readers and other collectors, in every order with few interruptions: nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ucp
from tests.commit.objects import Bucket, ObjectStore
from tests.commit.scenes import read
from tests.commit.schedule import Actor, Outcome, Scene, Stage, explore
from tests.commit.truth import opens, source
from ucp.errors import ConflictError, ContentError, NotFoundError, StorageError, UcpError, UsageError
from ucp.lifecycle.gc import gc
from ucp.lifecycle.shelf import remove_folder
from ucp.store import open_store
from ucp.testing.faults import Failure, placed
from ucp.train.save.engine import Engine
from ucp.train.save.forms import form_of

_RUN = "run"
_MODEL = torch.nn.Linear(7, 3).requires_grad_(False)


def _collect(*times: float) -> Actor:
    """Collects the garbage of the run, with a grace period of 10."""

    def actor(url: str) -> str:
        for now in times:
            gc(url, grace=10.0, clock=lambda now=now: now)  # type: ignore[misc]
        return "collected"

    return actor


def _convert(step: int, name: str, **options: Any) -> Actor:
    url = source(step)

    def actor(run: str) -> str:
        ucp.convert(url, f"{run}/{name}", share=True, workers=1, **options)
        return name

    return actor


def _plain(run: str) -> str:
    ucp.convert(source(1), f"{run}/new", workers=1)
    return "new"


def _save(name: str) -> Actor:
    def actor(run: str) -> str:
        Engine(None).save(_MODEL, f"{run}/{name}", step=1, form=form_of("native", share=True), overwrite=False)
        return name

    return actor


def _remove(name: str) -> Actor:
    """What retention does."""

    def actor(run: str) -> str:
        remove_folder(open_store(run), name)
        return "removed"

    return actor


def _read(name: str) -> Actor:
    def actor(run: str) -> int:
        return read(f"{run}/{name}")

    return actor


def _in_turn(*actors: Actor) -> Actor:
    def actor(run: str) -> str:
        return [str(one(run)) for one in actors][-1]

    return actor


def _after(*actors: Actor) -> dict[str, tuple[bytes, str]]:
    bucket = Bucket()
    with placed(scene=ObjectStore(bucket)):
        for actor in actors:
            actor(f"placed://scene/{_RUN}")
    return bucket.objects


def _whole(run: str) -> None:
    """Every checkpoint that there is opens, and holds what it should."""
    for folder in open_store(run).children():
        if folder.endswith("/") and folder != "shared/":
            name = folder[:-1]
            if name.startswith("saved"):
                _check_saved(f"{run}/{name}")
            else:
                assert opens(f"{run}/{name}") in (None, 1, 2)


def _check_saved(url: str) -> None:
    store = open_store(url)
    if store.exists("ucp.json"):
        with ucp.open(url) as found:
            assert torch.equal(found["weight"]["value"][...], _MODEL.weight)


def _writers_know(run: str, outcomes: Mapping[str, Outcome]) -> None:
    """Whoever was told that there is a checkpoint has one; errors are such as tell what to do."""
    _whole(run)
    for name, outcome in outcomes.items():
        assert outcome.ok or isinstance(outcome.error, (StorageError, ConflictError)), f"{name} ended with {outcome}"
        if outcome.ok and name.startswith("writer"):
            store = open_store(f"{run}/{outcome.value}")
            assert store.exists("zarr.json") or store.exists("ucp.json"), f"{outcome.value} is not there"


def _writers_succeed(run: str, outcomes: Mapping[str, Outcome]) -> None:
    _writers_know(run, outcomes)
    assert all(outcome.ok for name, outcome in outcomes.items() if name.startswith("writer")), outcomes


def _readers_are_told(run: str, outcomes: Mapping[str, Outcome]) -> None:
    _whole(run)
    reader = outcomes["reader"]
    assert reader.ok or isinstance(reader.error, (NotFoundError, ContentError)), reader


def _resumers_are_told(run: str, outcomes: Mapping[str, Outcome]) -> None:
    _whole(run)
    writer: UcpError | None = outcomes["writer"].error
    assert writer is None or isinstance(writer, (StorageError, ConflictError, UsageError)), writer


def _cut_short(actor: Actor, *, at: int) -> Actor:
    """`actor` as it goes when storage fails from operation `at` on."""

    def disturbed(run: str) -> str:
        with placed(failing=Failure(at, lasting=True).around(open_store(run))), pytest.raises(StorageError):
            actor("placed://failing")
        return "cut short"

    return disturbed


@cache
def _scenes() -> dict[str, Scene]:
    """By what they are about. Times: garbage was noted at 0, and is due from 10 on."""
    note, gone = _collect(0.0), _remove("old")
    converted = _after(_convert(1, "old"), _convert(2, "other"), gone, note)
    saved = _after(_save("saved-old"), _convert(2, "other"), _remove("saved-old"), note)
    resumable = _after(_convert(2, "other"), _cut_short(_plain, at=30), note)
    expired = _after(_convert(1, "old"), _convert(2, "other"), note)
    due = _collect(20.0)

    def scene(finally_: Callable[[str, Mapping[str, Outcome]], object], objects: Any, **actors: Actor) -> Scene:
        return Scene(actors, _whole, finally_, objects, _RUN)

    return {
        "what is due is converted again": scene(_writers_succeed, converted, writer=_convert(1, "new"), gc=due),
        "what is due is saved again": scene(_writers_succeed, saved, writer=_save("saved-new"), gc=due),
        "collected twice while converted again": scene(
            _writers_succeed, converted, writer=_convert(1, "new"), gc=_collect(20.0, 25.0)
        ),
        "two collectors and a writer": scene(_writers_know, converted, writer=_convert(1, "new"), one=due, two=due),
        "a slow collector is left alone": scene(
            _writers_know, converted, writer=_convert(1, "new"), one=due, two=_collect(25.0, 29.0)
        ),
        "converted again and given up, twice": scene(
            _writers_know, converted, writer=_in_turn(_convert(1, "new"), _remove("new"), _convert(1, "old")), gc=due
        ),
        "read, removed and collected": scene(
            _readers_are_told, expired, reader=_read("old"), gc=_in_turn(_remove("old"), _collect(20.0, 40.0))
        ),
        "resumed while its remains are collected": scene(_resumers_are_told, resumable, writer=_plain, gc=due),
        "read while others go": scene(_readers_are_told, converted, reader=_read("other"), gc=_collect(20.0, 40.0)),
    }


NAMES = sorted(_scenes())


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_once(name: str) -> None:
    assert explore(Stage(_scenes()[name]), switches=1) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_interrupted_twice(name: str) -> None:
    scene = _scenes()[name]
    assert explore(Stage(scene), switches=2, stride=len(scene.actors)) > 20


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_in_random_orders(data: st.DataObject) -> None:
    scene = _scenes()[data.draw(st.sampled_from(NAMES), label="scene")]
    turn = st.tuples(st.sampled_from(sorted(scene.actors)), st.integers(1, 15))
    Stage(scene).run(data.draw(st.lists(turn, max_size=20), label="order"))
