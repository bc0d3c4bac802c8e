"""Saves of several gloo ranks, one of which is killed at one of its operations."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from unittest import mock

from torch import distributed

import ucp
from tests.commit.crashing import TEARABLE, TRIES, Tally, named
from tests.commit.places import Place, State
from tests.commit.stories import CLAIM
from tests.commit.truth import opens, tensors
from ucp.errors import ConflictError, UcpError
from ucp.testing.faults import Crash, Fault, How, crash, placed

_URL = "placed://there/ckpt"


def run(
    world: int, place: Place, step: int, *, names: str, victim: int = 0, at: int = 0, how: How = "before", **options
):
    """Save a checkpoint of `step` on `world` ranks; what became of each of them. `victim` dies at operation `at`."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as pool:

        def rank(number: int) -> Crash:
            def work(fault: Fault) -> None:
                with (
                    placed(there=fault.around(place.store)),
                    named(names),
                    mock.patch("ucp.train.save.engine._ENGINES", []),
                    suppress(UcpError),
                ):
                    _save(number, world, f"{folder}/meet", step, options)

            return crash(work, at=at if number == victim else 0, how=how)

        return list(pool.map(rank, range(world)))


def _save(rank: int, world: int, meet: str, step: int, options) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        ucp.save(tensors(step), _URL, step=step, **options)
    except ConflictError:
        if opens(_URL) != step:
            raise


def exhaust(world: int, place: Place, *, form: str, old: int | None, step: int = 1) -> Tally:
    """Kill each rank at every `step`-th of its operations, in a save over `old` or into an empty folder."""
    new, options = 2, {"form": form, "overwrite": old is not None}
    tally = Tally(f"save {form} of {world} ranks", place.name)
    place.put_back({})
    if old is not None:
        _check_all(run(world, place, old, names="earlier", form=form))
    start, known, ends = place.state(), set(), []
    for state in ({**start, **CLAIM}, start):
        place.put_back(state)
        ranks = run(world, place, new, names="again", **options)
        _check_all(ranks)
        ends.append(place.state())
    for victim, told in enumerate(ranks):
        for operation in told.operations[::step]:
            for how in ("before", "torn") if operation.name in TEARABLE else ("before",):
                for _ in range(TRIES):
                    place.put_back(start)
                    ended = run(
                        world, place, new, names="first", victim=victim, at=operation.number, how=how, **options
                    )
                    _check_all(ended)
                    if ended[victim].at is not None:
                        break
                else:
                    tally.short += 1
                tally.points[f"rank {victim} {how}"] += 1
                left = frozenset(place.state().items())
                if left not in known:
                    known.add(left)
                    _check(world, place, new, old, ends, options, f"rank {victim}: {ended[victim]}")
    tally.states = len(known)
    assert tally.short <= tally.points.total() // 10, f"{tally.short} ended before: {tally}"
    return tally


def _check_all(ranks: list[Crash]) -> None:
    """Nobody hung, or raised anything but an error of ours."""
    assert not [one.error for one in ranks if one.error], "\n".join(one.error for one in ranks)


def _check(world: int, place: Place, new: int, old: int | None, ends: list[State], options, told: str) -> None:
    with placed(there=place.store):
        found = opens(_URL)
        assert found in (old, new), f"{told}: step {found} opens"
        _check_all(run(world, place, new, names="again", **options))
        assert opens(_URL) == new, told
    end = place.state()
    if found == new:
        end = {path: data for path, data in end.items() if path not in CLAIM}
    more = [sorted(end.keys() ^ wanted.keys()) for wanted in ends]
    assert end in ends or (found == new and old is None), f"{told}: other objects than undisturbed: {more}"
