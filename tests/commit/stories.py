"""Every way to write a checkpoint, to be disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any
from unittest import mock

import ucp
from tests.commit import keeping
from tests.commit.crashing import CHANGES, KINDS, Kind, Story, Tally, cut_short, exhaust
from tests.commit.places import LocalPlace, ObjectPlace, Place
from tests.commit.truth import opens, source, tensors
from ucp.errors import ConflictError
from ucp.run.claim import HEAD

Work = Callable[[str], object]


def convert(step: int, **options: Any) -> Work:
    """Converts a checkpoint of `step`, and notes every finished object at once, as a long conversion does."""
    url = source(step)

    def work(destination: str) -> None:
        with mock.patch("ucp.run.convert._FLUSH_SECONDS", -1.0):
            ucp.convert(url, destination, workers=1, **options)

    return work


def save(step: int, **options: Any) -> Work:
    """Saves a checkpoint of `step`, as a job does that is started again until it has one."""

    def work(url: str) -> None:
        try:
            ucp.save(tensors(step), url, step=step, **options)
        except ConflictError:
            if opens(url) != step:
                raise

    return work


def _one_after_the_other(*works: Work) -> Work:
    def work(url: str) -> None:
        for one in works:
            one(url)

    return work


CLAIM = {f"ckpt/{HEAD}": b"{}"}
"""A claim of nobody's: a universal save that finds it takes a generation of its own."""


def stories() -> list[Story]:
    """All of them."""
    return [
        Story("convert", convert(1), 1),
        Story("convert --overwrite", convert(2, overwrite=True), 2, 1, convert(1)),
        Story("convert --restart", convert(2, restart=True), 2, None, cut_short(convert(1), at=20)),
        Story(
            "convert --overwrite --restart",
            convert(3, overwrite=True, restart=True),
            3,
            1,
            _one_after_the_other(convert(1), cut_short(convert(2, overwrite=True), at=40)),
        ),
        Story("save", save(1), 1),
        Story("save over", save(2, overwrite=True), 2, 1, save(1)),
        Story("save universal", save(1, form="universal"), 1, litter=CLAIM, forgotten=tuple(CLAIM)),
        Story("save universal over", save(2, form="universal", overwrite=True), 2, 1, save(1, form="universal")),
    ]


PLACES: tuple[type[Place], ...] = (LocalPlace, ObjectPlace)


def tallies(
    places: Iterable[type[Place]] = PLACES, kinds: Iterable[Kind] = KINDS, *, quick: bool = False
) -> Iterator[Tally]:
    """Disturb every story in every place at every operation, or, when `quick`, at those that change something.

    For reports: checkpoints that were lost, mixed or left half-written are counted.
    """
    for make in places:
        for story in [*stories(), *keeping.stories()]:
            with closing(make()) as place:
                yield exhaust(story, place, tuple(kinds), only=CHANGES if quick else (), count=True)
