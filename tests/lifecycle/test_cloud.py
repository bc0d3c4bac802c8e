"""Copies, mirrors, repairs and tiers over real object stores, also while requests fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ucp
from tests.lifecycle.made import files, tensors
from tests.servers import Endpoint, Proxy
from tests.servers.faults import FlipInAnswer, LostAnswer, Refuse, ResetBefore, ResetDuringAnswer
from ucp.errors import CorruptError, UsageError
from ucp.lifecycle.contents import COPIED
from ucp.lifecycle.shelf import Shelf
from ucp.store import Store, open_store

SERVERS = ["moto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ceph", "azurite"))]
FAMILIES = ["native", "universal", "hf"]


@dataclass(frozen=True)
class Site:
    """A server behind a proxy; the environment leads there."""

    proxy: Proxy
    endpoint: Endpoint

    def folder(self) -> str:
        """URL of a folder that nobody has used."""
        return self.endpoint.url(f"lifecycle/{uuid.uuid4()}")


@pytest.fixture(params=SERVERS)
def site(
    request: pytest.FixtureRequest, served: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    endpoint = served(request.param)
    with Proxy(endpoint.port, seed=3) as proxy:
        through = endpoint.through(proxy.port)
        for name, value in through.environment().items():
            monkeypatch.setenv(name, value)
        yield Site(proxy, through)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """A run of one checkpoint, with an object of several parts; beside it other forms: ``native``, ``universal``."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(5)
    state = {"wide": torch.randn(2500, 1700, generator=generator), "small": torch.ones(3, dtype=torch.bfloat16)}
    ucp.save(state, str(folder / "native"), step=3)
    ucp.convert(str(folder / "native"), str(folder / "universal"))
    shutil.copytree(saved / "hf", folder / "hf")
    return folder


def held(url: str) -> dict[str, bytes]:
    store: Store = open_store(url)
    return {entry.path: store.read(entry.path) for entry in store.entries() if entry.path != COPIED}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(site: Site, large: Path, tmp_path: Path, family: str) -> None:
    url, second = site.folder(), site.folder()
    expected = files(large / family)
    report = ucp.copy(str(large / family), url, verify=True)
    assert held(url) == expected
    assert report.bytes_verified == sum(map(len, expected.values()))
    ucp.copy(url, second, verify=True)
    ucp.copy(second, str(tmp_path / "back"), verify=True)
    assert held(second) == expected
    assert tensors(tmp_path / "back") == tensors(large / family)
    assert ucp.copy(url, second).already_done
    with pytest.raises(UsageError):
        ucp.copy(str(large / ("hf" if family != "hf" else "native")), url, restart=True)
    with pytest.raises(UsageError, match="overlap"):
        ucp.copy(url, f"{url}/inside")


@pytest.mark.parametrize("fault", [ResetBefore(), ResetDuringAnswer(), LostAnswer(), Refuse(503)], ids=repr)
def test_through_faults(site: Site, large: Path, fault: object) -> None:
    """One request of sixteen fails; the bytes are the same."""
    url, second = site.folder(), site.folder()
    site.proxy.add(fault, count=None, probability=0.06)
    ucp.copy(str(large / "universal"), url, verify=True)
    ucp.copy(url, second, verify=True)
    site.proxy.clear()
    assert held(url) == held(second) == files(large / "universal")


def test_bits_that_flip_on_the_way_are_noticed(site: Site, large: Path, tmp_path: Path) -> None:
    url = site.folder()
    ucp.copy(str(large / "native"), url)
    site.proxy.add(FlipInAnswer(), method="GET", target="shards", count=None)
    with pytest.raises(CorruptError):
        ucp.copy(url, str(tmp_path / "there"))
    site.proxy.clear()
    ucp.copy(url, str(tmp_path / "there"), verify=True)
    assert files(tmp_path / "there") == files(large / "native")


def test_killed_and_run_again(site: Site, large: Path) -> None:
    """At many times; nothing opens before all of it is there."""
    url, expected = site.folder(), files(large / "universal")
    for requests in (1, 4, 8, 12):
        command = [sys.executable, "-m", "ucp", "cp", str(large / "universal"), url, "--quiet"]
        child = subprocess.Popen(command, env={**os.environ})
        before = len(site.proxy.exchanges)
        while child.poll() is None and len(site.proxy.exchanges) < before + requests:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
        site.proxy.settled()
        there = held(url)
        if "zarr.json" in there:
            assert there.items() >= expected.items()
    ucp.copy(str(large / "universal"), url, verify=True)
    assert held(url) == expected


def test_a_mirror(site: Site, saved: Path, tmp_path: Path) -> None:
    run, url = tmp_path / "run", site.folder()
    for step in (2, 3):
        shutil.copytree(saved / f"native-{step}", run / f"step-{step:08}")
        Shelf(str(run)).record(step, {"loss": 1 / step})
    assert ucp.sync(str(run), url, verify=True).copied == [3, 2]
    assert held(url) == files(run)
    Shelf(str(run)).remove(2)
    assert ucp.sync(str(run), url, delete=True).deleted == [2]
    assert held(url) == files(run)
    assert ucp.sync(url, str(tmp_path / "back")).copied == [3]
    assert files(tmp_path / "back") == files(run)


@pytest.mark.parametrize("family", ["native", "universal"])
def test_a_repair(site: Site, large: Path, family: str) -> None:
    url, expected = site.folder(), files(large / family)
    ucp.copy(str(large / family), url)
    store = open_store(url)
    names = sorted(expected.keys() - {"zarr.json", "ucp.json", "ucp-conversion.json"})
    for number, name in enumerate(names):
        data = bytearray(expected[name])
        data[len(data) // 2] ^= 8
        store.put(name, [bytes(data), bytes(data[:-1])][number % 2])
    store.delete(names[0])
    assert ucp.repair(url, copies=[str(large / family)], dry_run=True).ok
    report = ucp.repair(url, copies=[str(large / family)])
    assert report.ok
    assert {one.path for one in report.repaired} == set(names)
    assert held(url) == expected


def test_tiers(site: Site, tmp_path: Path) -> None:
    url, model = site.folder(), torch.nn.Linear(3, 3)
    with ucp.CheckpointManager(str(tmp_path / "fast"), upload=url, every=1, keep_latest=3, keep_local=1) as manager:
        for step in (1, 2, 3, 4):
            manager.step(step, model)
    assert [saved.step for saved in ucp.CheckpointManager(url).saved][-2:] == [3, 4]
    shutil.rmtree(tmp_path / "fast")
    other = torch.nn.Linear(3, 3)
    with ucp.CheckpointManager(str(tmp_path / "fast"), upload=url) as manager:
        resumed = manager.resume(other)
        assert resumed is not None
        assert resumed.url == f"{url}/step-00000004"
    assert torch.equal(other.weight, model.weight)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_web_server(served: Callable[[str], Endpoint], large: Path, tmp_path: Path, family: str) -> None:
    """It lists nothing: what the manifest names is copied, or what the family's reader uses."""
    endpoint = served("nginx")
    shutil.copytree(large / family, Path(endpoint.key, f"lifecycle-{family}"))
    ucp.copy(endpoint.url(f"lifecycle-{family}"), str(tmp_path / "there"), verify=True)
    assert tensors(tmp_path / "there") == tensors(large / family)
    copied = {path: data for path, data in files(tmp_path / "there").items() if path != COPIED}
    assert copied.items() <= files(large / family).items()
