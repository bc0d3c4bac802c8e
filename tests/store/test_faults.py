"""Whatever happens between a store and its server: what is read is right or an error, what was written is there."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from tests.servers import Endpoint, Proxy
from tests.servers.faults import (
    Delay,
    Fault,
    Header,
    Hold,
    LostAnswer,
    Refuse,
    ResetBefore,
    ResetDuringAnswer,
    ResetDuringRequest,
    Trickle,
    Truncate,
    Without,
)
from ucp.errors import ConflictError, CorruptError, StorageError
from ucp.store import Store, Writer, open_store
from ucp.testing.reading import noise

LARGE = noise((17 << 20) + 13)
"""Three parts of a large object."""
SMALL = noise(100_000)


@dataclass(frozen=True)
class Site:
    """A store whose requests go through a proxy."""

    server: str
    proxy: Proxy
    endpoint: Endpoint
    folder: str

    def store(self, **options: object) -> Store:
        return open_store(self.endpoint.url(self.folder), **options)


MARKS = {"moto": [], "ceph": [pytest.mark.slow]}
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]
SERVERS = [pytest.param(name, marks=MARKS.get(name, EXHAUSTIVE)) for name in ("moto", "ceph", "swift", "azurite")]


@pytest.fixture(params=SERVERS)
def site(request, served, monkeypatch) -> Iterator[Site]:
    endpoint = served(request.param)
    with Proxy(endpoint.port, seed=1) as proxy:
        behind = endpoint.through(proxy.port)
        for name, value in behind.environment().items():
            monkeypatch.setenv(name, value)
        yield Site(request.param, proxy, behind, f"faults/{uuid.uuid4()}")


def faults(first: list[Fault], more: list[Fault]) -> list[Any]:
    """Parameters: the `first` always, those that differ little in the long tests."""
    found = [(fault, []) for fault in first] + [(fault, [pytest.mark.slow]) for fault in more]
    return [pytest.param(fault, id=repr(fault).replace("'", ""), marks=marks) for fault, marks in found]


PASSING = faults(
    [ResetBefore(), LostAnswer(), Refuse(503, "SlowDown")],
    [
        Refuse(429, "TooManyRequests", retry_after=1),
        Refuse(500, "InternalError"),
        Refuse(502, "BadGateway"),
        Refuse(504, "GatewayTimeout"),
    ],
)
SLOWNESS = faults([], [Delay(0.3)])
IN_ANSWERS = faults(
    [ResetDuringAnswer(), Truncate(), Truncate(honest=False)],
    [
        ResetDuringAnswer(0.0),
        Truncate(0.0),
        Truncate(0.0, honest=False),
        Header("Content-Length", "17"),
        Trickle(1 << 18, 0.01),
    ],
)
NONSENSE = faults([Header("Content-Range", "bytes 0-99/100")], [Header("Content-Range", None)])
IN_REQUESTS = faults([ResetDuringRequest()], [ResetDuringRequest(0.0), ResetDuringRequest(0.99)])


@pytest.mark.parametrize("fault", [*PASSING, *SLOWNESS, *IN_ANSWERS])
class TestReading:
    def test_one_fault_changes_nothing(self, site, fault):
        store = site.store()
        store.put("a", SMALL)
        site.proxy.add(fault, method="GET", target="/a$", count=1)
        assert store.read("a", 1000, 50_000) == SMALL[1000:51_000]
        assert site.proxy.injected == {fault.kind: 1}

    def test_one_fault_among_parts_read_at_once(self, site, fault):
        store = site.store()
        with store.create("a", len(LARGE)) as writer:
            writer.write_at(0, LARGE)
        site.proxy.add(fault, method="GET", target="/a$", skip=1, count=1)
        buffer = bytearray(len(LARGE))
        store.read_into("a", 0, buffer)
        assert buffer == LARGE
        assert site.proxy.injected == {fault.kind: 1}


@pytest.mark.parametrize("fault", [*PASSING[:3], *IN_ANSWERS[:-1], *NONSENSE])
def test_what_never_passes_is_an_error_and_no_bytes(site, fault):
    store = site.store(attempts=3, retry_seconds=5.0)
    store.put("a", SMALL)
    site.proxy.add(fault, method="GET", target="/a$", count=None)
    before = time.monotonic()
    with pytest.raises((StorageError, CorruptError), match="/a: "):
        store.read_into("a", 1000, bytearray(50_000))
    assert time.monotonic() - before < 15
    assert 1 <= site.proxy.injected[fault.kind] <= 4


@pytest.mark.parametrize("fault", [*PASSING, *SLOWNESS, *IN_REQUESTS])
class TestWriting:
    def test_one_fault_in_a_put(self, site, fault):
        store = site.store()
        site.proxy.add(fault, method="PUT", count=1)
        store.put("a", SMALL)
        assert site.proxy.injected == {fault.kind: 1}
        assert store.read("a") == SMALL

    @pytest.mark.parametrize("part", [0, 1])
    def test_one_fault_in_a_large_object(self, site, fault, part):
        store = site.store()
        site.proxy.add(fault, method="PUT", skip=part, count=1)
        with store.create("a", len(LARGE)) as writer:
            writer.write_at(0, LARGE)
        assert site.proxy.injected == {fault.kind: 1}
        assert store.read("a") == LARGE


@pytest.mark.parametrize("target", [pytest.param("uploads", marks=pytest.mark.slow), "uploadId"])
@pytest.mark.parametrize("fault", [*PASSING, *IN_ANSWERS[1:3]])
def test_one_fault_where_an_upload_begins_or_ends(site, fault, target):
    """Where its end may have been reached or not, that is an error; written again, the object is there."""
    # Azure's uploads begin with the first part and end with the list of parts; both are put.
    spelled = {"uploads": "comp=block(&|$)", "uploadId": "comp=blocklist"}[target]
    method, target = ("PUT", spelled) if site.server == "azurite" else ("POST", target)
    store = site.store()
    site.proxy.add(fault, method=method, target=target, count=1)
    for _ in range(2):
        with suppress(StorageError), store.create("a", len(LARGE)) as writer:
            writer.write_at(0, LARGE)
    # What Azure answers there has no body that could be cut.
    nothing = site.server == "azurite" and isinstance(fault, Truncate)
    assert site.proxy.injected == ({} if nothing else {fault.kind: 1})
    assert store.read("a") == LARGE
    assert len(list(store.entries())) == 1


@pytest.mark.parametrize("fault", [*PASSING, *IN_REQUESTS])
class TestConditions:
    def test_no_false_conflict(self, site, fault):
        """A put whose answer was lost finds its own object there; that is no conflict."""
        store = site.store()
        site.proxy.add(fault, method="PUT", count=2)
        store.put("a", SMALL, if_absent=True)
        assert site.proxy.injected == {fault.kind: 2}
        with pytest.raises(ConflictError):
            store.put("a", SMALL[::-1], if_absent=True)
        assert store.read("a") == SMALL

    def test_no_false_conflict_where_something_is_replaced(self, site, fault):
        store = site.store()
        store.put("a", b"old")
        seen = store.entry("a").fingerprint
        site.proxy.add(fault, method="PUT", count=2)
        if site.server == "swift":
            with pytest.raises(StorageError, match="501 NotImplemented"):
                store.put("a", SMALL, if_match=seen)
            return
        store.put("a", SMALL, if_match=seen)
        assert site.proxy.injected == {fault.kind: 2}
        with pytest.raises(ConflictError):
            store.put("a", SMALL[::-1], if_match=seen)
        assert store.read("a") == SMALL

    def test_a_true_conflict_is_told(self, site, fault):
        store = site.store()
        store.put("a", b"somebody else's")
        site.proxy.add(fault, method="PUT", count=1)
        with pytest.raises(ConflictError):
            store.put("a", SMALL, if_absent=True)
        assert site.proxy.injected == {fault.kind: 1}
        with pytest.raises(StorageError if site.server == "swift" else ConflictError):
            store.put("a", SMALL, if_match="0123456789abcdef0123456789abcdef")
        assert store.read("a") == b"somebody else's"


def test_a_server_that_sends_all_where_a_part_was_asked_for_is_an_error(site):
    """As simple servers do: the first bytes must not be taken for those in the middle."""
    store = site.store(attempts=2)
    store.put("a", SMALL)
    site.proxy.add(Without("Range"), method="GET", target="/a$", count=None)
    # Where the range is signed, the server finds the signature wrong.
    said = "ignores ranges" if site.server == "moto" else "access denied"
    with pytest.raises(StorageError, match=said):
        store.read_into("a", 1000, bytearray(500))
    assert site.proxy.injected


def test_a_server_that_hangs_is_asked_again(site):
    """After so long without a byte; the connection alone says nothing."""
    store = site.store(read_timeout=1.0)
    before = time.monotonic()
    site.proxy.add(Delay(20), method="PUT", count=1)
    store.put("a", SMALL)
    site.proxy.add(Delay(20), method="GET", count=1)
    assert store.read("a", 0, len(SMALL)) == SMALL
    assert site.proxy.injected == {Delay.kind: 2}
    assert time.monotonic() - before < 18


def test_parts_of_two_versions_are_never_mixed(site):
    """An object that is replaced between two requests of one read."""
    store = site.store()
    with store.create("a", len(LARGE)) as writer:
        writer.write_at(0, LARGE)
    other = LARGE[::-1]
    held, before = Hold(), len(site.proxy.exchanges)
    site.proxy.add(held, method="GET", target="/a$", skip=1, count=1)
    with ThreadPoolExecutor(1) as pool:
        buffer = bytearray(len(LARGE))
        reading = pool.submit(store.read_into, "a", 0, buffer)
        # Two parts are answered, and the server has not heard of the third.
        deadline = time.monotonic() + 60
        while sum(one.method == "GET" for one in site.proxy.exchanges[before:]) < 2:
            assert time.monotonic() < deadline, site.proxy.exchanges
            time.sleep(0.01)
        assert site.proxy.injected == {Hold.kind: 1}
        site.store().put("a", other)
        held.until.set()
        with pytest.raises(CorruptError, match="replaced while it was read"):
            reading.result()
    assert store.read("a") == other


def test_a_storm(site):
    """Every fourth exchange fails in some way, over many objects at once; each is there in the end, and right."""
    store = site.store()
    for fault in (ResetBefore(), LostAnswer(), Refuse(503), ResetDuringAnswer(), Truncate(honest=False)):
        site.proxy.add(fault, method="GET|PUT", count=None, probability=0.06)
    contents = {f"storm/{number}": noise(20_000 + number) for number in range(60)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.put(path, contents[path], if_absent=True), contents))
        read = dict(zip(contents, pool.map(store.read, contents), strict=True))
    assert read == contents
    assert site.proxy.injected.total() >= 15
    site.proxy.rules.clear()
    assert [entry.path for entry in store.entries("storm/")] == sorted(contents)


class TestADeadServer:
    def test_a_short_pause_is_survived(self, site):
        """Connections are cut and new ones refused while a large object is written, and while it is read."""
        store = site.store()
        with store.create("a", len(LARGE)) as writer:
            writer.write_at(0, LARGE[: 9 << 20])
            self.interrupt(site, 1.0)
            writer.write_at(9 << 20, LARGE[9 << 20 :])
        self.interrupt(site, 1.0)
        assert store.read("a") == LARGE

    def interrupt(self, site: Site, seconds: float) -> None:
        site.proxy.pause()
        threading.Timer(seconds, site.proxy.resume).start()

    def test_a_long_one_is_an_error_that_leaves_nothing(self, site):
        store = site.store(attempts=3, retry_seconds=2.0)
        writer = store.create("a", len(LARGE))
        writer.write_at(0, LARGE[: 9 << 20])
        site.proxy.pause()
        before = time.monotonic()
        with pytest.raises(StorageError) as caught:
            self.finish(writer, LARGE[9 << 20 :])
        assert caught.value.exit_code == 7
        assert time.monotonic() - before < 20
        site.proxy.resume()
        assert not store.exists("a")
        with store.create("a", len(LARGE)) as again:
            again.write_at(0, LARGE)
        assert store.read("a") == LARGE

    def finish(self, writer: Writer, rest: bytes) -> None:
        with writer:
            writer.write_at(len(LARGE) - len(rest), rest)
