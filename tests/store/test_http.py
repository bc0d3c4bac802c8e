"""Reading over HTTP from servers that serve ranges: a real web server, and the public side of object stores."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch

import ucp
from tests.servers import Endpoint, Proxy
from tests.servers.endpoint import BUCKET
from tests.servers.faults import ResetDuringAnswer, Truncate, Without
from tests.servers.s3 import client
from ucp.errors import StorageError, UsageError
from ucp.store import Store, open_store
from ucp.testing.reading import Fill, ReadConformance


def uploaded(endpoint: Endpoint, folder: str, objects: Mapping[str, bytes]) -> str:
    """URL of a folder of public objects."""
    with closing(client(endpoint)) as s3:
        for path, data in objects.items():
            s3.put_object(Bucket=BUCKET, Key=f"{folder}/{path}", Body=data, ACL="public-read")
    return f"{endpoint.address}/{BUCKET}/{folder}"


def written(endpoint: Endpoint, folder: str, objects: Mapping[str, bytes]) -> str:
    """URL of a folder that nginx serves."""
    for path, data in objects.items():
        file = Path(endpoint.key, folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return endpoint.url(folder)


class HttpConformance(ReadConformance):
    """`server` is one of `tests.servers.SERVERS`."""

    server: str

    @pytest.fixture
    def filled(self, served) -> Fill:
        endpoint = served(self.server)
        put = written if endpoint.protocol == "http" else uploaded

        def fill(objects: Mapping[str, bytes]) -> Store:
            return open_store(put(endpoint, f"http/{uuid.uuid4()}", objects))

        return fill

    def test_nothing_can_be_written(self, filled):
        store = filled({"a": b"1"})
        for write in (lambda: store.put("a", b"2"), lambda: store.create("b", 1), lambda: store.delete("a")):
            with pytest.raises(UsageError, match="over HTTP"):
                write()
        assert store.read("a") == b"1"
        assert not store.lists


class TestMoto(HttpConformance):
    server = "moto"
    large_bytes = (17 << 20) + 13


@pytest.mark.slow
class TestCeph(HttpConformance):
    server = "ceph"

    def test_a_missing_object_is_not_found(self, filled):
        """Those who may not list are not told what is missing, as at Amazon's."""
        store = filled({"there": b"1"})
        with pytest.raises(StorageError, match="access denied") as caught:
            store.read("nothing")
        assert "not there" in (caught.value.hint or "")
        assert not store.exists("nothing")


@pytest.mark.slow
class TestNginx(HttpConformance):
    server = "nginx"


@pytest.mark.parametrize("server", ["moto", pytest.param("nginx", marks=pytest.mark.slow)])
def test_a_checkpoint_is_loaded_through_a_bad_line(served, tmp_path, server):
    endpoint = served(server)
    truth = {"w": torch.arange(600_000.0).reshape(600, 1000), "b": torch.ones(7)}
    ucp.save(truth, str(tmp_path / "native"), step=9)
    ucp.convert(str(tmp_path / "native"), str(tmp_path / "universal"))
    local = open_store(str(tmp_path / "universal"))
    objects = {entry.path: local.read(entry.path) for entry in local.entries()}
    with Proxy(endpoint.port) as proxy:
        put = written if endpoint.protocol == "http" else uploaded
        url = put(endpoint.through(proxy.port), f"http/{uuid.uuid4()}", objects)
        proxy.add(Truncate(honest=False), method="GET", target="/c/", count=2)
        proxy.add(ResetDuringAnswer(), method="GET", count=2)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
        ucp.load(loaded, url)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in truth.items())
        assert proxy.injected.total() >= 3
        proxy.clear()
        proxy.add(Without("Range"), method="GET", target="/c/", count=None)
        with pytest.raises(StorageError, match="ranges"):
            ucp.load(loaded, url)
