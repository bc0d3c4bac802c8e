"""The sections of docs/reliability.md: each runs something and says what came of it, in Markdown."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from bench import cloud, digests
from bench.reliability.data import SHAPES
from bench.reliability.storm import OPERATIONS, Outcome, flips, serving, storm
from bench.report import table
from tests.commit.crashing import KINDS, Kind, Tally
from tests.commit.scenes import scenes
from tests.commit.schedule import Stage, explore
from tests.commit.stories import PLACES, tallies
from tests.integrity.flipping import disturb
from tests.integrity.flipping import flips as places_of
from tests.integrity.made import make, url_of
from tests.integrity.reading import WAYS, by_opening
from ucp.mapping import read_source
from ucp.run.integrity import Spans
from ucp.store import open_store
from ucp.store.cloud.store import CloudStore

Sizes = Mapping[str, int]
CHANGING: tuple[Kind, ...] = ("before", "torn", "error", "lost")
"""What can happen to an operation that leaves something else than was there; after one is before the next."""


class Section(NamedTuple):
    """Markdown, and how much in it is not as promised."""

    text: str
    bad: int = 0


def network(server: str, place: Path, sizes: Sizes) -> Section:
    """Operations through a storm of faults."""
    found = storm(server, place, rounds=sizes["rounds"])
    rows = [_row(operation, [found[operation, shape] for shape in SHAPES]) for operation in OPERATIONS]
    columns = ["", "done", "requests", "faults", "errors told, run again", "bytes lost", "bytes read wrong"]
    injected = sum((outcome.injected for outcome in found.values()), Counter[str]())
    kinds = table(["fault", "injected"], [[kind, f"{count:,}"] for kind, count in injected.most_common()])
    held = []
    for (operation, shape), outcome in sorted(found.items()):
        row = [f"{operation}, {shape}", f"{median(outcome.calm):.2f}", f"{median(outcome.stormy):.2f}"]
        held.append([*row, f"{outcome.injected.total() / max(1, outcome.requests):.0%}"])
    speed = table(["", "s without faults", "s with faults", "requests struck"], held)
    bad = sum(outcome.lost + outcome.wrong for outcome in found.values())
    return Section(f"{table(columns, rows)}\n\n{kinds}\n\n{speed}", bad)


def _row(operation: str, outcomes: list[Outcome]) -> list[str]:
    def total(name: str) -> str:
        return f"{sum(getattr(one, name) for one in outcomes):,}"

    faults = sum(one.injected.total() for one in outcomes)
    first = [operation, total("done"), total("requests"), f"{faults:,}", total("errors")]
    wrote = operation in ("save", "convert", "cp")
    return [*first, total("lost") if wrote else "", "" if wrote else total("wrong")]


def wire(server: str, place: Path, sizes: Sizes) -> Section:
    """Bits flipped between store and server."""
    rows, found = [], flips(server, place, count=sizes["wire"])
    for one in found:
        figures = (one.flipped, one.refused, one.found_later, one.repaired, one.wrong)
        rows.append([one.direction, *(f"{figure:,}" for figure in figures)])
    columns = ["bits flipped in", "flipped", "error at once", "error when read", "right all the same", "bytes wrong"]
    return Section(table(columns, rows), sum(one.wrong for one in found))


def rest(server: str, place: Path, sizes: Sizes) -> Section:
    """Bits flipped where a checkpoint lies."""
    del server
    rows, bad = [], 0
    for form in ("native", "universal", "torch", "dcp", "safetensors"):
        folder = make(form, place / form)
        ours = form in ("native", "universal")
        found = places_of(folder, sizes["flips"], random.Random(5))
        tally = disturb(folder, place, found, ways=WAYS if ours else (by_opening,), every=2)
        bad += (len(tally.wrong) + len(tally.unfound)) * ours
        row = [form, f"{_under_digests(folder):.0%}", tally.bits, tally.found, tally.same + len(tally.unfound)]
        rows.append([*map(str, row), *map(str, (tally.refused, tally.right, len(tally.wrong)))])
    columns = ["form", "tensors under digests", "bits flipped", "found by verify --deep", "not found"]
    return Section(table([*columns, "reads refused", "reads right", "reads wrong"], rows), bad)


def _under_digests(folder: Path) -> float:
    """The part of the bytes of tensors that some digest of the checkpoint covers."""
    catalog, _ = read_source(url_of(folder))
    spans = Spans(catalog.checksums)
    total = covered = 0
    for fragments in catalog.fragments.values():
        for extent in (fragment.extent for fragment in fragments):
            start, stop = extent.span
            total += stop - start
            for checksum in (spans.checksums[number] for number in spans.touched(extent.object, start, stop)):
                covered += min(stop, checksum.offset + checksum.length) - max(start, checksum.offset)
    return covered / total


_KINDS = {
    "before": "killed before it",
    "after": "killed after it",
    "torn": "killed in the middle of it",
    "error": "it fails",
    "lost": "its answer is lost",
}


def crashes(server: str, place: Path, sizes: Sizes) -> Section:
    """Processes killed and storage failing at every operation, and several at one URL in every order."""
    del server, place
    everywhere = bool(sizes["everywhere"])
    points: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    states: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        disturbed = [
            pool.submit(_tallies, where, kind, everywhere=everywhere)
            for kind in (KINDS if everywhere else CHANGING)
            for where in range(len(PLACES))
        ]
        explored = {name: pool.submit(_orders, name) for name in scenes()}
        for tally in (tally for future in disturbed for tally in future.result()):
            points[tally.story] += tally.points.total()
            states[tally.story] += tally.states
            broken[tally.story] += tally.broken
            kinds += tally.points
        found = {name: future.result() for name, future in explored.items()}
    orders = [[name, f"{runs:,}", f"{mixed:,}"] for name, (runs, mixed) in found.items()]
    rows = [[story, f"{points[story]:,}", f"{states[story]:,}", f"{broken[story]:,}"] for story in points]
    rows.append(["all", f"{points.total():,}", f"{states.total():,}", f"{broken.total():,}"])
    killed = table(["disturbed", "points", "different remains", "checkpoints lost or mixed"], rows)
    injected = table(["disturbance", "points"], [[_KINDS[kind], f"{count:,}"] for kind, count in kinds.items()])
    together = table(["several at one URL", "orders", "mixtures read, or two winners"], orders)
    bad = broken.total() + sum(mixed for _, mixed in found.values())
    return Section(f"{killed}\n\n{injected}\n\n{together}", bad)


def _tallies(where: int, kind: Kind, *, everywhere: bool) -> list[Tally]:
    return list(tallies(PLACES[where : where + 1], (kind,), quick=not everywhere))


def _orders(name: str) -> tuple[int, int]:
    """How many orders were run, and how many of them went wrong: the first one that does ends it."""
    stage = Stage(scenes()[name])
    try:
        return explore(stage, switches=1), 0
    except AssertionError:
        return stage.runs, 1


def throughput(server: str, place: Path, sizes: Sizes) -> Section:
    """Stores as a ratio to the bare client."""
    del place
    with serving(server) as endpoint:
        store = open_store(endpoint.url("throughput"))
        assert isinstance(store, CloudStore)
        data = np.random.default_rng(0).integers(0, 256, sizes["mib"] << 20, np.uint8).data
        buffer = memoryview(bytearray(len(data)))
        found = cloud.measure(cloud.Work(store, store.client, data, buffer, 100), sizes["rounds"])
        assert buffer == data
        return Section(cloud.report(found))


def digest_cost(server: str, place: Path, sizes: Sizes) -> Section:
    """What digests cost a load."""
    del server
    return Section(digests.report(digests.measure(place / "digests", mib=sizes["digests"], rounds=sizes["rounds"])))


SECTIONS: dict[str, Callable[[str, Path, Sizes], Section]] = {
    "network": network,
    "wire": wire,
    "rest": rest,
    "crashes": crashes,
    "throughput": throughput,
    "digests": digest_cost,
}
