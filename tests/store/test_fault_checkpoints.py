"""Checkpoints through faults: conversions end with the same bytes or an error, and run again where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import torch

import ucp
from tests.servers import Endpoint, Proxy, running
from tests.servers.faults import (
    Delay,
    FlipInAnswer,
    FlipInRequest,
    LostAnswer,
    Refuse,
    ResetBefore,
    ResetDuringAnswer,
    ResetDuringRequest,
    Stale,
    Truncate,
)
from tests.servers.fixtures import server_kind
from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.mapping import read_source
from ucp.run.verify import verify
from ucp.store import Store, open_store

STEP = 3


def tensors() -> dict[str, torch.Tensor]:
    """Some smaller than a part, and one of several."""
    generator = torch.Generator().manual_seed(5)
    found = {f"layers.{n}.weight": torch.randn(200, 300, generator=generator) for n in range(6)}
    return {**found, "wide": torch.randn(2500, 1700, generator=generator), "scale": torch.ones(3, dtype=torch.bfloat16)}


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) for entry in store.entries()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("source") / "native")
    ucp.save(tensors(), folder, step=STEP)
    return folder


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory) -> dict[str, bytes]:
    """What every conversion of `source` must end with."""
    folder = str(tmp_path_factory.mktemp("reference") / "universal")
    ucp.convert(source, folder)
    return contents(open_store(folder))


SERVERS = ["moto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ceph", "azurite"))]


@dataclass(frozen=True)
class Site:
    """A server behind a proxy; the environment leads there."""

    proxy: Proxy
    endpoint: Endpoint

    def folder(self) -> str:
        return self.endpoint.url(f"checkpoints/{uuid.uuid4()}")


@contextmanager
def behind(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Proxy(endpoint.port, seed=3) as proxy:
        through = endpoint.through(proxy.port)
        for name, value in through.environment().items():
            monkeypatch.setenv(name, value)
        yield Site(proxy, through)


@pytest.fixture(params=SERVERS)
def site(request, served, monkeypatch) -> Iterator[Site]:
    with behind(served(request.param), monkeypatch) as site:
        yield site


def copied(source: str, url: str) -> str:
    """A copy of the checkpoint at `source`, object by object."""
    store = open_store(url)
    for path, data in contents(open_store(source)).items():
        store.put(path, data)
    return url


def run(*words: str, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ucp", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


HURRIED = {"UCP_STORE_ATTEMPTS": "3", "UCP_STORE_RETRY_SECONDS": "2"}
STORM = (
    ResetBefore(),
    LostAnswer(),
    Refuse(503),
    ResetDuringAnswer(),
    Truncate(honest=False),
    ResetDuringRequest(),
)


def test_a_conversion_in_a_storm_ends_with_the_same_bytes(site, source, reference):
    """Of all requests a third fails in some way; lists and conditional puts too. Run again where it gives up."""
    for fault in STORM:
        site.proxy.add(fault, count=None, probability=0.06)
    url = site.folder()
    for _ in range(4):
        with suppress(StorageError):
            ucp.convert(source, url)
    injected = site.proxy.injected.total()
    site.proxy.clear()
    assert contents(open_store(url)) == reference
    assert injected >= 5


def test_a_load_in_a_storm_loads_the_same(site, source):
    url = copied(source, site.folder())
    for fault in STORM[:5]:
        site.proxy.add(fault, method="GET|HEAD", count=None, probability=0.06)
    truth = tensors()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    for _ in range(3):
        ucp.load(loaded, url)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in truth.items())
        loaded = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    assert site.proxy.injected.total() >= 3


@pytest.mark.parametrize("form", ["native", "universal"])
def test_a_bit_flipped_on_the_way_from_the_server_is_found(site, source, tmp_path, form):
    """In any object of the checkpoint: what is loaded in the end is right, or there was an error."""
    if form == "universal":
        ucp.convert(source, str(tmp_path / "universal"))
        source = str(tmp_path / "universal")
    url, truth = copied(source, site.folder()), tensors()
    errors = 0
    for number in range(8):
        site.proxy.clear()
        site.proxy.add(FlipInAnswer(), method="GET", target="checkpoints/[^?]*$", skip=number)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
        try:
            ucp.load(loaded, url)
        except (CorruptError, NotFoundError, StorageError):
            errors += 1
        else:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in truth.items())
            struck = [seen.target for seen in site.proxy.settled() if seen.faults]
            assert not [target for target in struck if "/c/" in target or "/shards/" in target]
    assert errors >= 3


@pytest.mark.parametrize("number", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 5))])
def test_a_bit_flipped_on_the_way_to_the_server_is_found(site, source, reference, number):
    """By the server, or by the digests: always when it is verified, and when it is loaded wherever that reads it."""
    site.proxy.add(FlipInRequest(), method="PUT", target="/c/0", skip=number)
    url, refused = site.folder(), False
    try:
        ucp.convert(source, url)
    except (CorruptError, StorageError):
        refused = True
    assert site.proxy.injected == {FlipInRequest.kind: 1}
    if not refused:
        assert not verify(*read_source(url), deep=True).ok
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        try:
            ucp.load(loaded, url)
        except CorruptError:
            return
        # What follows a tensor's chunks in its object tells other clients where they lie; no load of ours reads it.
        damaged = [name for name, data in contents(open_store(url)).items() if data != reference.get(name, data)]
        assert damaged, "nothing is damaged"
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())


def test_a_list_that_lags_behind_overwrites_nothing(site, source, reference, tmp_path):
    """It still shows the folder empty when another writer is done."""
    url = site.folder()
    site.proxy.add(Stale(), method="GET", target="list", count=None)
    assert contents(open_store(url)) == {}
    ucp.save({"other": torch.ones(3)}, str(tmp_path / "other"), step=1)
    rules, site.proxy.rules = site.proxy.rules, []
    ucp.convert(source, url)
    site.proxy.rules = rules
    with pytest.raises(UsageError, match="another checkpoint"):
        ucp.convert(str(tmp_path / "other"), url)
    site.proxy.rules = []
    assert contents(open_store(url)) == reference


class TestTheServerDies:
    """In the middle of a conversion, which fails in bounded time and ends with the same bytes when run again."""

    @pytest.mark.slow
    @pytest.mark.parametrize("objects", [1, 6, 14])
    def test_and_comes_back_later(self, site, source, reference, objects):
        url = site.folder()
        site.proxy.add(Delay(0.05), method="PUT", count=None)
        watcher = threading.Thread(target=self.pause_after, args=(site.proxy, objects))
        watcher.start()
        failed = run("convert", source, url, **HURRIED)
        watcher.join()
        assert failed.returncode == 7, failed.stderr
        assert "again" in failed.stderr
        site.proxy.resume()
        assert run("info", url).returncode == 3
        again = run("convert", source, url)
        assert again.returncode == 0, again.stderr
        assert contents(open_store(url)) == reference

    def pause_after(self, proxy: Proxy, objects: int) -> None:
        until = time.monotonic() + 30
        while sum(seen.method == "PUT" for seen in proxy.exchanges) < objects and time.monotonic() < until:
            time.sleep(0.005)
        proxy.pause()

    def test_and_comes_back_soon(self, site, source, reference):
        url = site.folder()
        site.proxy.add(Delay(0.05), method="PUT", count=None)
        watcher = threading.Thread(target=self.pause_after, args=(site.proxy, 4))
        watcher.start()
        with ThreadPoolExecutor(1) as pool:
            converting = pool.submit(ucp.convert, source, url)
            watcher.join()
            time.sleep(0.5)
            site.proxy.resume()
            converting.result()
        assert contents(open_store(url)) == reference

    @pytest.mark.slow
    # Not azurite: it keeps what it acknowledged in memory for a while, and a killed one may have lost it.
    @pytest.mark.parametrize("name", ["ceph", "swift"])
    def test_by_sigkill(self, name, monkeypatch, source, reference):
        """The real one: while a conversion writes, while a load reads; what was acknowledged is still there."""
        with running(server_kind(name)) as server, behind(server.endpoint, monkeypatch) as site:
            url = site.folder()
            site.proxy.add(Delay(0.05), method="PUT", count=None)
            with ThreadPoolExecutor(1) as pool:
                for objects in (3, 9):
                    converting = pool.submit(run, "convert", source, url, **HURRIED)
                    self.wait_for(site.proxy, "PUT", objects)
                    server.kill()
                    assert converting.result().returncode == 7
                    server.start()
                site.proxy.clear()
                assert run("convert", source, url).returncode == 0
                assert contents(open_store(url)) == reference
                site.proxy.add(Delay(0.2), method="GET", count=None)
                loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors().items()}
                loading = pool.submit(ucp.load, loaded, url)
                self.wait_for(site.proxy, "GET", 3)
                server.kill()
                server.start()
                loading.result()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors().items())

    def wait_for(self, proxy: Proxy, method: str, count: int) -> None:
        before = sum(seen.method == method for seen in proxy.exchanges)
        until = time.monotonic() + 60
        while sum(seen.method == method for seen in proxy.exchanges) < before + count:
            assert time.monotonic() < until
            time.sleep(0.01)
