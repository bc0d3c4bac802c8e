"""The same suite for every server there is, and for each how it falls short, where it does."""

from __future__ import annotations

import uuid

import pytest

from tests.servers.endpoint import Endpoint
from ucp.errors import StorageError
from ucp.store import Store, open_store
from ucp.testing.stores import StoreConformance


class ServerConformance(StoreConformance):
    """`server` is the name of one of `tests.servers.SERVERS`; each test has a folder of its own there."""

    server: str

    @pytest.fixture
    def endpoint(self, served, monkeypatch) -> Endpoint:
        endpoint = served(self.server)
        for name, value in endpoint.environment().items():
            monkeypatch.setenv(name, value)
        return endpoint

    @pytest.fixture
    def store(self, endpoint: Endpoint) -> Store:
        return open_store(endpoint.url(f"conformance/{uuid.uuid4()}"))


class TestMoto(ServerConformance):
    server = "moto"
    large_bytes = (17 << 20) + 13

    def winners(self, store):
        """Its threads look and put without a lock: a condition keeps out only who comes later."""
        return range(1, 9)

    @pytest.mark.slow
    def test_many_objects(self, store):
        super().test_many_objects(store)


@pytest.mark.slow
class TestCeph(ServerConformance):
    server = "ceph"


@pytest.mark.slow
class TestSwift(ServerConformance):
    """Looks whether an object is there before it writes it, not at once, and knows no If-Match."""

    server = "swift"

    def winners(self, store):
        return range(1, 9)

    def test_put_if_match_replaces_only_what_was_seen(self, store):
        """What cannot be promised is refused, and nothing is written."""
        store.put("a", b"first")
        with pytest.raises(StorageError, match="501 NotImplemented"):
            store.put("a", b"second", if_match=store.entry("a").fingerprint)
        assert store.read("a") == b"first"

    def test_the_fingerprint_of_a_list_serves_as_a_condition(self, store):
        store.put("a", b"first")
        (seen,) = store.entries("a")
        with pytest.raises(StorageError, match="501 NotImplemented"):
            store.put("a", b"second", if_match=seen.fingerprint)

    def test_of_many_that_replace_an_object_one_wins(self, store):
        store.put("race", b"before")
        with pytest.raises(StorageError, match="501 NotImplemented"):
            super().test_of_many_that_replace_an_object_one_wins(store)
        assert store.read("race") == b"before"


@pytest.mark.slow
class TestAzurite(ServerConformance):
    server = "azurite"
