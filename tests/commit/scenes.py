"""Writers, readers and deleters at one URL, to be run in every order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import ucp
from tests.commit.objects import Bucket, ObjectStore
from tests.commit.schedule import Actor, Outcome, Scene, Stage, explore
from tests.commit.truth import opens, source, tensors, universal
from ucp.errors import ConflictError, ContentError, NotFoundError, UcpError, UsageError
from ucp.lifecycle.copy import copy
from ucp.lifecycle.shelf import remove_folder
from ucp.mapping import read_source
from ucp.store import open_store
from ucp.testing.example import held, read_all
from ucp.testing.faults import placed
from ucp.train.save.engine import Engine
from ucp.train.save.forms import form_of

_FOLDER = "ckpt"


def convert(step: int, **options: Any) -> Actor:
    """Converts a checkpoint of `step`; returns that."""
    url = source(step)

    def actor(destination: str) -> int:
        ucp.convert(url, destination, workers=1, **options)
        return step

    return actor


def save(step: int, form: str = "native", *, overwrite: bool = False) -> Actor:
    """Saves a checkpoint of `step`, as a job of its own; returns that."""

    def actor(url: str) -> int:
        Engine(None).save(tensors(step), url, step=step, form=form_of(form), overwrite=overwrite)
        return step

    return actor


def read(url: str) -> int:
    """Reads all of a checkpoint; returns its step, of which everything in it is."""
    catalog, store = read_source(url)
    assert catalog.step is not None
    found = read_all(catalog, store)
    assert found == {name: {"value": held(tensor)} for name, tensor in tensors(catalog.step).items()}, "a mixture"
    return catalog.step


def copied(step: int, **options: bool) -> Actor:
    """Copies a checkpoint of `step` from somewhere else; returns that."""
    url = universal(step)

    def actor(destination: str) -> int:
        copy(url, destination, workers=1, **options)
        return step

    return actor


def removed(url: str) -> str:
    """Deletes the checkpoint."""
    run, _, name = url.rpartition("/")
    remove_folder(open_store(run), name)
    return "removed"


def after(*actors: Actor) -> dict[str, tuple[bytes, str]]:
    """The objects that are there when `actors` have been at work one after the other."""
    bucket = Bucket()
    with placed(scene=ObjectStore(bucket)):
        for actor in actors:
            actor(f"placed://scene/{_FOLDER}")
    return bucket.objects


def _only(*steps: int | None) -> Callable[[str], None]:
    def look(url: str) -> None:
        found = opens(url)
        assert found in steps, f"step {found} opens, and not one of {steps}"

    return look


def _each_is_whole(url: str) -> None:
    """Of two forms: whichever opens is whole, and where both do, a reader is told so."""
    found = [form for form, step in (("native", 1), ("universal", 2)) if opens(url, form) == step]
    if len(found) < 2:
        _only(None, 1, 2)(url)
        return
    with pytest.raises(ConflictError, match="two checkpoints"):
        opens(url)


def each_made_its_own(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """Whoever was told so has made one, and the other was told that it has not."""
    made = {name for name, outcome in outcomes.items() if outcome.ok}
    assert made
    assert made == {name for name in outcomes if opens(url, name) is not None}
    _clear_errors(outcomes, ConflictError, UsageError)


def one_wins(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """What opens is what somebody made who was told so; the others were told that they were not the first."""
    found = opens(url)
    assert found is not None, "nobody made a checkpoint"
    assert found in {outcome.value for outcome in outcomes.values() if outcome.ok}, f"{found} opens, made by nobody"
    _clear_errors(outcomes, ConflictError, UsageError)


def exactly_one_wins(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """As `one_wins`, and nobody else was told to have made one."""
    one_wins(url, outcomes)
    made = [name for name, outcome in outcomes.items() if outcome.ok]
    assert len(made) == 1, f"{made} have all made one"


def readers_see_one(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """The writer succeeded; the reader read one checkpoint, or was told that there is none any more."""
    assert outcomes["writer"].ok
    assert opens(url) == outcomes["writer"].value
    _clear_errors({"reader": outcomes["reader"]}, NotFoundError, ContentError)


def one_wins_and_readers_see_one(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """Among the writers one won."""
    one_wins(url, {name: outcome for name, outcome in outcomes.items() if name != "reader"})
    _clear_errors({"reader": outcomes["reader"]}, NotFoundError, ContentError)


def readers_see_one_or_none(url: str, outcomes: Mapping[str, Outcome]) -> None:
    """The reader read the checkpoint, or was told that it is gone."""
    assert outcomes["writer"].ok
    assert opens(url) is None
    _clear_errors({"reader": outcomes["reader"]}, NotFoundError, ContentError)


def _clear_errors(outcomes: Mapping[str, Outcome], *kinds: type[UcpError]) -> None:
    for name, outcome in outcomes.items():
        assert outcome.ok or isinstance(outcome.error, kinds), f"{name} ended with {outcome}"


def scenes() -> dict[str, Scene]:
    """All of them, by what they are about."""
    replace, first = {"overwrite": True}, after(convert(1))
    native, universal = after(save(1)), after(save(1, "universal"))
    both = {"writer": convert(2, **replace), "reader": read}
    return {
        "two copies": Scene({"a": copied(1), "b": copied(2)}, _only(None, 1, 2), exactly_one_wins),
        "one copied twice": Scene({"a": copied(1), "b": copied(1)}, _only(None, 1), one_wins),
        "copy and conversion": Scene({"copy": copied(1), "convert": convert(2)}, _only(None, 1, 2), exactly_one_wins),
        "copy and save": Scene({"copy": copied(1), "save": save(2, "universal")}, _only(None, 1, 2), exactly_one_wins),
        "read while removed": Scene(
            {"writer": removed, "reader": read}, _only(None, 1), readers_see_one_or_none, first
        ),
        "two conversions": Scene({"a": convert(1), "b": convert(2)}, _only(None, 1, 2), exactly_one_wins),
        "one plan twice": Scene({"a": convert(1), "b": convert(1)}, _only(None, 1), one_wins),
        "taken over from a zombie": Scene(
            {"zombie": convert(1), "other": convert(2, restart=True)}, _only(None, 1, 2), exactly_one_wins
        ),
        "two overwrite": Scene(
            {"a": convert(2, **replace), "b": convert(3, **replace)}, _only(1, 2, 3), one_wins, first
        ),
        "one overwrites twice": Scene(
            {"a": convert(2, **replace), "b": convert(2, **replace)}, _only(1, 2), one_wins, first
        ),
        "overwritten and taken over": Scene(
            {"a": convert(2, **replace), "b": convert(3, restart=True, **replace)}, _only(1, 2, 3), one_wins, first
        ),
        "overwritten before it was there": Scene(
            {"a": convert(1), "b": convert(2, restart=True, **replace)}, _only(None, 1, 2), one_wins
        ),
        "read while overwritten": Scene(both, _only(1, 2), readers_see_one, first),
        "read while two overwrite": Scene(
            {"a": convert(2, **replace), "b": save(3, "universal", **replace), "reader": read},
            _only(1, 2, 3),
            one_wins_and_readers_see_one,
            first,
        ),
        "two saves": Scene({"a": save(1), "b": save(2)}, _only(None, 1, 2), exactly_one_wins),
        "two saves overwrite": Scene(
            {"a": save(2, **replace), "b": save(3, **replace)}, _only(1, 2, 3), one_wins, native
        ),
        "read while saved over": Scene(
            {"writer": save(2, **replace), "reader": read}, _only(1, 2), readers_see_one, native
        ),
        "two universal saves": Scene(
            {"a": save(1, "universal"), "b": save(2, "universal")}, _only(None, 1, 2), exactly_one_wins
        ),
        "two universal saves overwrite": Scene(
            {"a": save(2, "universal", **replace), "b": save(3, "universal", **replace)},
            _only(1, 2, 3),
            one_wins,
            universal,
        ),
        "save and conversion": Scene(
            {"save": save(1, "universal"), "convert": convert(2)}, _only(None, 1, 2), exactly_one_wins
        ),
        # Their roots are two objects, of which no store puts one on the condition that the other is not there.
        "save of one form and of the other": Scene(
            {"native": save(1), "universal": save(2, "universal")}, _each_is_whole, each_made_its_own
        ),
    }


def explored(switches: int = 1, *, stride: int = 1) -> dict[str, int]:
    """How many orders of each scene were run, in all of which everything held; AssertionError for the first other."""
    return {name: explore(Stage(scene), switches=switches, stride=stride) for name, scene in scenes().items()}
