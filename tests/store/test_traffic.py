"""What stores count."""

from __future__ import annotations

import os
import pickle
import threading
import uuid

import pytest

from ucp.errors import NotFoundError, StorageError
from ucp.store import open_store
from ucp.store.errors import translated
from ucp.store.traffic import TRAFFIC, Counters, Requests, Retries, Traffic


def since(before: Traffic) -> dict[str, Requests]:
    return {op: row for (_, op), row in TRAFFIC.snapshot().since(before).requests.items()}


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_requests_and_bytes_are_counted(tmp_path, scheme):
    store = open_store(str(tmp_path) if scheme == "file" else f"memory://{uuid.uuid4().hex}")
    before = TRAFFIC.snapshot()
    store.put("a", b"12345")
    with store.create("b", 7) as writer:
        writer.write_at(0, b"1234")
        writer.write_at(4, b"567")
    assert store.read("b", 1, 3) == b"234"
    store.read_runs("b", [0, 4], 2, memoryview(bytearray(4)))
    assert store.entry("a").size == 5
    assert not store.exists("c")
    assert [entry.path for entry in store.entries()] == ["a", "b"]
    assert store.children() == ["a", "b"]
    store.delete("a")
    found = since(before)
    assert found["put"] == Requests(1, 0, 0, 5)
    assert found["part"] == Requests(2, 0, 0, 7)
    assert found["get"].read == 7
    assert found["head"].count == 2
    assert found["list"].count == 2
    assert found["delete"].count == 1
    assert {key[0] for key in TRAFFIC.snapshot().since(before).requests} == {scheme}


def test_what_is_not_there_is_an_answer_and_what_breaks_a_failure():
    before = TRAFFIC.snapshot()
    with pytest.raises(NotFoundError), translated("made-up://x/y", "head"):
        raise FileNotFoundError("y")
    with pytest.raises(StorageError), translated("made-up://x/y", "get"):
        raise OSError("reset")
    found = TRAFFIC.snapshot().since(before)
    assert found.requests == {("made-up", "head"): Requests(1), ("made-up", "get"): Requests(0, 1)}


def test_threads_lose_no_count():
    counters = Counters()

    def count() -> None:
        for _ in range(10_000):
            counters.request("s3", "get", 3)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot().requests == {("s3", "get"): Requests(80_000, 0, 240_000, 0)}


def test_what_another_process_counted_is_added_once():
    worker, parent = Counters(), Counters()
    for counters in (worker, parent):
        counters.request("s3", "put", written=10)
        counters.retried("s3", "throttled", 0.5)
    parent.add(pickle.loads(pickle.dumps(worker.drain())))
    parent.add(worker.drain())
    expected = Traffic({("s3", "put"): Requests(2, 0, 0, 20)}, {("s3", "throttled"): Retries(2, 1.0)})
    assert parent.snapshot() == expected
    assert parent.snapshot().since(expected) == Traffic()


def test_a_forked_child_begins_at_zero():
    TRAFFIC.request("made-up", "get", 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(len(TRAFFIC.snapshot().requests)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 10) == b"0"
    os.close(reader)
