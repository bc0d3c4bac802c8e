"""Checkpoints written and read through a proxy that breaks requests, on servers that run here."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ucp
from bench.reliability.data import SHAPES, Tensors, blank, differing, tensors
from tests.servers import SERVERS, Proxy, running
from tests.servers.endpoint import Endpoint
from tests.servers.faults import (
    Fault,
    FlipInAnswer,
    FlipInRequest,
    LostAnswer,
    Refuse,
    ResetBefore,
    ResetDuringAnswer,
    ResetDuringRequest,
    Truncate,
)
from ucp.errors import ConflictError, UcpError
from ucp.lifecycle.copy import copy
from ucp.mapping import read_source
from ucp.run.verify import verify

STORM: tuple[Fault, ...] = (
    ResetBefore(),
    LostAnswer(),
    Refuse(503),
    Refuse(429, "TooManyRequests"),
    ResetDuringAnswer(),
    Truncate(),
    Truncate(honest=False),
    ResetDuringRequest(),
)
_EACH = 0.04
"""Of all requests, the part that each of these strikes."""

_TRIES = 20
_OBJECTS = r"reliability/[^?]*$"
"""Requests for objects, as against lists."""

_READS = 6
"""How many of them a load makes: the root twice, the training state, the digests, and two tensors."""

OPERATIONS = ("save", "convert", "cp", "load", "verify --deep")


@dataclass(slots=True)
class Outcome:
    """What became of one kind of operation. `lost` and `wrong` are bytes, `errors` how often it had to be run again."""

    operation: str
    done: int = 0
    errors: int = 0
    requests: int = 0
    lost: int = 0
    wrong: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    calm: list[float] = field(default_factory=list)
    stormy: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Site:
    """A server, and the proxy in front of it."""

    proxy: Proxy
    endpoint: Endpoint
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def folder(self) -> str:
        """A URL where nothing is yet."""
        return self.endpoint.url(f"reliability/{uuid.uuid4()}")

    def through(self, operation: str, shape: str, work: Callable[[], object], rules: tuple[Fault, ...] = STORM) -> None:
        """Do `work` while `rules` strike, again where that ends in an error."""
        outcome = self.outcomes.setdefault((operation, shape), Outcome(operation))
        for _ in range(_TRIES):
            for fault in rules:
                self.proxy.add(fault, count=None, probability=_EACH)
            started = time.perf_counter()
            try:
                work()
            except UcpError:
                outcome.errors += 1
            else:
                outcome.done += 1
                outcome.stormy.append(time.perf_counter() - started)
                return
            finally:
                self.proxy.rules.clear()
                outcome.injected += self.proxy.injected
                outcome.requests += len(self.proxy.exchanges)
                self.proxy.clear()
        raise AssertionError(f"{operation}: {_TRIES} times an error")

    def calmly(self, operation: str, shape: str, work: Callable[[], object]) -> None:
        """Do `work` with nothing in the way, for comparison."""
        self.proxy.clear()
        started = time.perf_counter()
        work()
        outcome = self.outcomes.setdefault((operation, shape), Outcome(operation))
        outcome.calm.append(time.perf_counter() - started)
        self.proxy.clear()


@contextmanager
def serving(server: str) -> Iterator[Endpoint]:
    """A server of this kind, to which the environment leads."""
    with running(SERVERS[server]) as upstream, environment(upstream.endpoint):
        yield upstream.endpoint


@contextmanager
def environment(endpoint: Endpoint) -> Iterator[None]:
    """What a user sets to reach it, as long as it is needed."""
    before = dict(os.environ)
    os.environ.update(endpoint.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def site(server: str, seed: int) -> Iterator[Site]:
    """A server of this kind behind a proxy; the environment leads there."""
    with serving(server) as upstream, Proxy(upstream.port, seed=seed) as proxy:
        through = upstream.through(proxy.port)
        with environment(through):
            yield Site(proxy, through)


def storm(server: str, place: Path, *, rounds: int, seed: int = 1) -> dict[tuple[str, str], Outcome]:
    """Every operation, `rounds` times for each shape of tensors, through the storm; each first once without."""
    logging.getLogger("ucp").setLevel(logging.CRITICAL)
    with site(server, seed) as here:
        for shape in SHAPES:
            truth = tensors(shape)
            local = str(place / f"{server}-{SHAPES.index(shape)}")
            ucp.save(truth, local, step=1)
            for number in range(rounds):
                _round(here, shape, truth, local, calm=number == 0)
        return here.outcomes


def _round(here: Site, shape: str, truth: Tensors, local: str, *, calm: bool) -> None:
    def saved(url: str) -> Callable[[], object]:
        def work() -> None:
            try:
                ucp.save(truth, url, step=1)
            except ConflictError:
                # The save before was told that it failed, and had been committed all the same.
                read_source(url)

        return work

    def converted(url: str) -> Callable[[], object]:
        return lambda: ucp.convert(local, url)

    def copied(url: str) -> Callable[[], object]:
        return lambda: copy(converted_to, url)

    def loaded() -> None:
        found = blank(truth)
        ucp.load(found, converted_to)
        here.outcomes["load", shape].wrong += differing(found, truth)

    def verified() -> None:
        catalog, store = read_source(converted_to)
        verdict = verify(catalog, store, deep=True)
        # All is right where it lies: a finding is a wrong answer.
        here.outcomes["verify --deep", shape].wrong += len(verdict.findings)

    here.outcomes.setdefault(("load", shape), Outcome("load"))
    here.outcomes.setdefault(("verify --deep", shape), Outcome("verify --deep"))
    converted_to = here.folder()
    for operation, write in (("save", saved), ("convert", converted), ("cp", copied)):
        if calm:
            here.calmly(operation, shape, write(here.folder()))
        url = converted_to if operation == "convert" else here.folder()
        here.through(operation, shape, write(url))
        here.outcomes[operation, shape].lost += _lost(url, truth)
    for operation, read in (("load", loaded), ("verify --deep", verified)):
        if calm:
            here.calmly(operation, shape, read)
        here.through(operation, shape, read)


def _lost(url: str, truth: Tensors) -> int:
    """Bytes of an acknowledged checkpoint that are not what was given, read with nothing in the way."""
    catalog, store = read_source(url)
    if not verify(catalog, store, deep=True).ok:
        return sum(tensor.nbytes for tensor in truth.values())
    return differing(ucp.open(url, verify=False).state_dict(), truth)


@dataclass(slots=True)
class Flips:
    """Bits that were flipped between store and server, and how operations ended in which they were."""

    direction: str
    flipped: int = 0
    refused: int = 0
    repaired: int = 0
    found_later: int = 0
    wrong: int = 0


def flips(server: str, place: Path, *, count: int, seed: int = 2) -> list[Flips]:
    """One bit of one answer while a checkpoint is loaded, and of one request while one is written."""
    logging.getLogger("ucp").setLevel(logging.CRITICAL)
    reading, writing = Flips("answers, while loading"), Flips("requests, while converting")
    truth = tensors(SHAPES[1])
    local = str(place / f"{server}-flips")
    ucp.save(truth, local, step=1)
    with site(server, seed) as here:
        url = here.folder()
        ucp.convert(local, url)
        for number in range(count):
            here.proxy.clear()
            here.proxy.add(FlipInAnswer(), method="GET", target=_OBJECTS, skip=number % _READS)
            _flipped_answer(here, reading, url, truth)
            here.proxy.clear()
            here.proxy.add(FlipInRequest(), method="PUT", skip=number % 12)
            _flipped_request(here, writing, local, truth)
    return [reading, writing]


def _flipped_answer(here: Site, found: Flips, url: str, truth: Tensors) -> None:
    target = blank(truth)
    try:
        ucp.load(target, url)
    except UcpError:
        found.refused += 1
    else:
        bad = differing(target, truth)
        found.wrong += bad
        found.repaired += bool(not bad and here.proxy.injected.total())
    found.flipped += here.proxy.injected.total()


def _flipped_request(here: Site, found: Flips, local: str, truth: Tensors) -> None:
    url = here.folder()
    try:
        ucp.convert(local, url)
    except UcpError:
        found.refused += 1
        return
    finally:
        found.flipped += here.proxy.injected.total()
        struck = bool(here.proxy.injected.total())
        here.proxy.clear()
    target = blank(truth)
    try:
        ucp.load(target, url)
    except UcpError:
        found.found_later += 1
    else:
        bad = differing(target, truth)
        found.wrong += bad
        found.repaired += bool(struck and not bad)
