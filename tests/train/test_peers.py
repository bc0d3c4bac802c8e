"""Memory of other ranks, read over real connections: every byte right, every failure an error."""

from __future__ import annotations

import contextlib
import socket
import threading
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gloo import spawn
from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.train.peers import Address, Memory, MemoryServer, PeersStore, object_of
from ucp.train.peers import store as client

KEY = b"k" * 16
OTHER = object_of(1)
opened: list[PeersStore] = []


@pytest.fixture
def server():
    server = MemoryServer("127.0.0.1")
    yield server
    server.close()
    while opened:
        opened.pop().close()


def memory(*sizes: int) -> tuple[Memory, bytes]:
    ends = [0, *accumulate(sizes)]
    data = bytes(number * 7 % 251 for number in range(ends[-1]))
    return Memory([memoryview(data)[a:b] for a, b in pairwise(ends)]), data


def store_of(address: Address, size: int, **options) -> PeersStore:
    opened.append(PeersStore(KEY, {OTHER: address}, {OTHER: size}, **options))
    return opened[-1]


@given(st.lists(st.integers(0, 9), max_size=6), st.data())
def test_pieces_are_one_run_of_addresses(sizes, data) -> None:
    held, whole = memory(*sizes)
    assert held.nbytes == len(whole)
    offset = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - offset))
    assert b"".join(held.views(offset, length)) == whole[offset : offset + length]
    for outside in ((-1, 1), (0, -1), (offset, len(whole) - offset + 1)):
        with pytest.raises(CorruptError):
            list(held.views(*outside))


@pytest.mark.parametrize("mine", [True, False])
def test_reads_ranges_and_runs(server, mine) -> None:
    held, data = memory(1000, 3, 70_000, 1)
    server.offer(KEY, held)
    store = store_of(server.address, len(data), mine={OTHER: held} if mine else {})
    assert store.read(OTHER) == data
    assert store.read(OTHER, 999, 5) == data[999:1004]
    assert store.read(OTHER, 10, 0) == b""
    offsets = [5000, 0, 998, 70_990]
    buffer = bytearray(4 * 14)
    store.read_runs(OTHER, offsets, 14, memoryview(buffer))
    assert bytes(buffer) == b"".join(data[o : o + 14] for o in offsets)
    assert [entry.size for entry in store.entries()] == [len(data)]
    store.close()


def test_many_runs_are_several_requests(server, monkeypatch) -> None:
    monkeypatch.setattr(client.wire, "MOST_RANGES", 8)
    held, data = memory(5000)
    server.offer(KEY, held)
    offsets = list(range(0, 4000, 41))
    buffer = bytearray(len(offsets) * 3)
    store_of(server.address, 5000).read_runs(OTHER, offsets, 3, memoryview(buffer))
    assert bytes(buffer) == b"".join(data[o : o + 3] for o in offsets)


def test_many_threads_read_at_once(server) -> None:
    held, data = memory(300_000)
    server.offer(KEY, held)
    store = store_of(server.address, len(data))
    wrong: list[int] = []

    def read(start: int) -> None:
        reads = ((at, store.read(OTHER, at, 50_000)) for at in range(start, 200_000, 9973))
        wrong.extend(at for at, found in reads if found != data[at : at + 50_000])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_not_there(server) -> None:
    held, _ = memory(100)
    store = store_of(server.address, 100)
    with pytest.raises(NotFoundError, match="offers its memory no longer"):
        store.read(OTHER, 0, 1)
    server.offer(KEY, held)
    with pytest.raises(CorruptError, match="outside"):
        store.read(OTHER, 90, 11)
    with pytest.raises(CorruptError, match="outside"):
        store.read(OTHER, 1 << 63, 1)
    assert len(store.read(OTHER, 90, 10)) == 10
    server.withdraw(KEY)
    with pytest.raises(NotFoundError):
        store.read(OTHER, 0, 1)
    for wrong in (lambda: store.read(object_of(7), 0, 1), lambda: store.entry(object_of(7))):
        with pytest.raises(NotFoundError):
            wrong()
    for write in (lambda: store.put("x", b""), lambda: store.create("x", 1), lambda: store.delete(OTHER)):
        with pytest.raises(UsageError, match="only be read"):
            write()


def test_without_the_secret_nothing_is_said(server) -> None:
    held, _ = memory(100)
    server.offer(KEY, held)
    with pytest.raises(StorageError):
        store_of(server.address._replace(secret=b"x" * 32), 100).read(OTHER, 0, 1)
    with socket.create_connection(server.address[:2]) as connection:
        connection.sendall(b"x" * 64)
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_a_request_that_is_none_of_ours_ends_the_connection(server) -> None:
    with socket.create_connection(server.address[:2]) as connection:
        connection.sendall(server.address.secret + KEY + b"\xff" * 12)
        connection.settimeout(30)
        assert connection.recv(1) == b""


def test_a_rank_that_is_gone(server) -> None:
    held, _ = memory(100)
    server.offer(KEY, held)
    store = store_of(server.address, 100)
    assert len(store.read(OTHER)) == 100
    server.close()
    for _ in range(2):
        with pytest.raises(StorageError, match=r"gone|cannot be reached"):
            store.read(OTHER)


def ranks(rank: int, world: int) -> bool:
    from torch import distributed

    own = bytes([rank]) * 100_000
    server = MemoryServer()
    server.offer(KEY, Memory([memoryview(own)]))
    addresses: list[Address] = [server.address] * world
    distributed.all_gather_object(addresses, server.address)
    store = PeersStore(
        KEY, {object_of(r): a for r, a in enumerate(addresses)}, {object_of(r): 100_000 for r in range(world)}
    )
    good = all(store.read(object_of(other)) == bytes([other]) * 100_000 for other in range(world))
    distributed.barrier()
    store.close()
    server.close()
    return good


def test_ranks_of_a_job_read_each_other() -> None:
    assert spawn(ranks, 3) == [True] * 3
