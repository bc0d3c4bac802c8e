"""The side that reads: a store whose objects are the memory of ranks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.store import Buffer, Entry, Store, Writer
from ucp.train.peers import wire
from ucp.train.peers.memory import Memory
from ucp.train.peers.server import Address

_TIMEOUT_SECONDS = 120.0
"""Without a byte from a rank, after which it counts as gone."""


def object_of(rank: int) -> str:
    """The object that is the memory of a rank."""
    return f"rank-{rank:05}"


class PeersStore(Store):
    """What ranks offer under one `key`, object by object; this rank's own, `mine`, is read without a connection.

    `addresses` are by object, as are `sizes`, in bytes. It can only be read. StorageError where a rank is gone,
    NotFoundError where it has withdrawn what it offered.
    """

    def __init__(
        self,
        key: bytes,
        addresses: Mapping[str, Address],
        sizes: Mapping[str, int],
        mine: Mapping[str, Memory] | None = None,
    ) -> None:
        self.url = "memory of the ranks"
        self.key = key
        self.addresses = addresses
        self.sizes = sizes
        self.mine = mine or {}
        self._idle: dict[str, list[socket.socket]] = {}
        self._lock = threading.Lock()

    def entry(self, path: str) -> Entry:
        if path not in self.sizes:
            raise NotFoundError(f"{self.url}: there is no {path}")
        return Entry(path, self.sizes[path], self.key.hex())

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        yield from (self.entry(path) for path in sorted(self.sizes) if path.startswith(prefix))

    def children(self, path: str = "") -> list[str]:
        return [] if path else sorted(self.sizes)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        if path in self.mine:
            at = 0
            for piece in self.mine[path].views(offset, len(view)):
                view[at : at + len(piece)] = piece
                at += len(piece)
        elif len(view):
            self._ask(path, len(view), [offset], view)

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        if path in self.mine or not length:
            super().read_runs(path, offsets, length, buffer)
            return
        most = max(1, min(wire.MOST_RANGES, wire.MOST_BYTES // length))
        for start in range(0, len(offsets), most):
            asked = offsets[start : start + most]
            self._ask(path, length, asked, buffer[start * length : (start + len(asked)) * length])

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connection in (one for held in idle.values() for one in held):
            connection.close()

    def create(self, path: str, size: int) -> Writer:
        self._read_only()

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        self._read_only()

    def delete(self, path: str) -> None:
        self._read_only()

    def child(self, path: str) -> Store:
        raise UsageError(f"{self.url} has no folders")

    def _read_only(self) -> NoReturn:
        raise UsageError(f"{self.url} can only be read")

    def _ask(self, path: str, length: int, offsets: Sequence[int], buffer: memoryview) -> None:
        connection = self._connected(path)
        try:
            connection.sendall(wire.request(self.key, length, offsets))
            status = bytearray(1)
            wire.receive(connection, memoryview(status))
            if bytes(status) == wire.OK:
                wire.receive(connection, buffer)
        except OSError as error:
            connection.close()
            raise StorageError(f"{path}: that rank is gone ({type(error).__name__}: {error})") from error
        with self._lock:
            self._idle.setdefault(path, []).append(connection)
        if bytes(status) == wire.UNKNOWN:
            raise NotFoundError(f"{path}: that rank offers its memory no longer")
        if bytes(status) == wire.OUTSIDE:
            raise CorruptError(f"{path}: {length} bytes from {offsets[0]} are outside of what that rank offers")

    def _connected(self, path: str) -> socket.socket:
        with self._lock:
            idle = self._idle.get(path)
            if idle:
                return idle.pop()
        if path not in self.addresses:
            raise NotFoundError(f"{self.url}: there is no {path}")
        host, port, secret = self.addresses[path]
        try:
            connection = socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(secret)
        except OSError as error:
            raise StorageError(f"{path}: that rank cannot be reached at {host}:{port} ({error})") from error
        return connection
