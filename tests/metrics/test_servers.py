"""What is counted of a real object store is what went over the wire."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.servers import Endpoint, Proxy
from tests.servers.faults import Refuse, ResetBefore
from ucp.errors import StorageError
from ucp.store import Store, open_store
from ucp.store.traffic import TRAFFIC, Requests


@pytest.fixture
def proxy(served, monkeypatch) -> Iterator[Proxy]:
    endpoint: Endpoint = served("moto")
    with Proxy(endpoint.port, seed=1) as made:
        for name, value in endpoint.through(made.port).environment().items():
            monkeypatch.setenv(name, value)
        made.url = endpoint.url(uuid.uuid4().hex)
        yield made


def test_requests_bytes_retries_and_failures_of_a_bucket(proxy):
    store: Store = open_store(proxy.url)
    before = TRAFFIC.snapshot()
    proxy.add(Refuse(503, "SlowDown"), method="PUT", count=2)
    store.put("small", bytes(1000))
    with store.create("large", 9 << 20) as writer:
        writer.write_at(0, bytes(9 << 20))
    assert len(store.read("small")) == 1000
    assert len(store.read("large")) == 9 << 20
    store.read_into("large", 100, bytearray(50))
    assert not store.exists("nothing")
    store.delete("small")
    assert [entry.path for entry in store.entries()] == ["large"]
    proxy.add(ResetBefore(), method="GET", count=None)
    with pytest.raises(StorageError):
        open_store(proxy.url, attempts=2).read_into("large", 0, bytearray(10))
    since = TRAFFIC.snapshot().since(before)
    by_operation = {operation: row for (scheme, operation), row in since.requests.items() if scheme == "s3"}
    assert since.read == 1000 + (9 << 20) + 50
    assert since.written == 1000 + (9 << 20)
    assert by_operation["get"].failed == 1
    assert by_operation["head"] == Requests(1)
    assert by_operation["delete"] == Requests(1)
    assert by_operation["list"].count == 1
    retries = {reason: row for (scheme, reason), row in since.retries.items() if scheme == "s3"}
    assert retries["throttled"].count == 2
    assert retries["throttled"].waited > 0
    assert sum(row.count for row in retries.values()) == 3, retries
    methods = Counter(exchange.method for exchange in proxy.settled())
    answered = sum(row.count for row in by_operation.values())
    assert answered <= methods.total()
