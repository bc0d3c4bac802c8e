"""The side that has the memory: a small server in threads, which gives bytes to who knows the secret."""

from __future__ import annotations

import hmac
import os
import socket
import threading
from contextlib import suppress
from typing import NamedTuple

from ucp.errors import CorruptError, StorageError
from ucp.train.peers import wire
from ucp.train.peers.memory import Memory

_PATIENCE_SECONDS = 20.0
"""For somebody who connects to say the secret."""


class Address(NamedTuple):
    """Where a rank's server is, and what it wants to hear first."""

    host: str
    port: int
    secret: bytes


class MemoryServer:
    """Offers pieces of this process's memory, each under an id of 16 bytes, until they are withdrawn.

    Readers must know the random secret in `address`; nothing they send is kept or carried out, they can only read.
    """

    def __init__(self, host: str | None = None) -> None:
        self._offered: dict[bytes, Memory] = {}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        host = host or own_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=512)
        self.address = Address(host, self._listener.getsockname()[1], os.urandom(wire.SECRET_BYTES))
        threading.Thread(target=self._accept, name="ucp-memory", daemon=True).start()

    def offer(self, key: bytes, memory: Memory) -> None:
        """Let `memory` be read under `key`, which is 16 bytes."""
        assert len(key) == 16, "an id has 16 bytes"
        self._offered[key] = memory

    def withdraw(self, key: bytes) -> None:
        """Offer no longer what is under `key`; who is reading it gets the rest of this one request."""
        self._offered.pop(key, None)

    def close(self) -> None:
        """Stop; whoever is connected is cut off."""
        self._offered.clear()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), name="ucp-memory", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            with connection, suppress(OSError, StorageError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._knows(connection):
                    while (asked := wire.read_request(connection)) is not None:
                        self._answer(connection, *asked)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _knows(self, connection: socket.socket) -> bool:
        said = bytearray(wire.SECRET_BYTES)
        connection.settimeout(_PATIENCE_SECONDS)
        wire.receive(connection, memoryview(said))
        connection.settimeout(None)
        return hmac.compare_digest(bytes(said), self.address.secret)

    def _answer(self, connection: socket.socket, key: bytes, length: int, offsets: tuple[int, ...]) -> None:
        memory = self._offered.get(key)
        if memory is None:
            connection.sendall(wire.UNKNOWN)
            return
        try:
            views = [view for offset in offsets for view in memory.views(offset, length)]
        except CorruptError:
            connection.sendall(wire.OUTSIDE)
            return
        connection.sendall(wire.OK)
        if len(views) > len(offsets) or len(views) == 1:
            for view in views:
                connection.sendall(view)
        else:
            connection.sendall(b"".join(views))


def own_address() -> str:
    """The address by which the other ranks' hosts reach this one: the one that leads to the rank that leads the job."""
    leader = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(leader, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing: it only asks which way packets would go
            return str(probe.getsockname()[0])
    return "127.0.0.1"
