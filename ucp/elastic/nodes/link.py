"""Connections to one node: kept, made anew, and given up for a while when it does not answer."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ucp.elastic.nodes.server import Address
from ucp.elastic.nodes.wire import Line, Request
from ucp.errors import StorageError, UcpError
from ucp.store.traffic import TRAFFIC

T = TypeVar("T")

TIMEOUT_SECONDS = 20.0
"""Without a byte from a node, after which it counts as gone."""

_DISK_FACTOR = 6
"""So much longer may it take to make objects durable, or to remove many."""

_SLOWEST_DISK = 4 << 20
"""Bytes per second that a disk may need, for each process that sends to it, to make durable what was sent."""

_IDLE = 16
"""Connections that are kept."""


class Link:
    """Connections to one node, for any number of threads. Counts `sent` and `received` bytes of objects.

    `flushed` is how many had been sent when objects were last made durable.
    A node that could not be reached is asked again only after `timeout` seconds: nobody waits twice for the dead.
    """

    def __init__(self, name: str, address: Address, timeout: float) -> None:
        self.name, self.address, self.timeout = name, address, timeout
        self.sent = self.received = self.flushed = 0
        self._gone_until, self._why = 0.0, ""
        self._idle: list[Line] = []
        self._lock, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type[Link], tuple[str, Address, float]]:
        return (Link, (self.name, self.address, self.timeout))

    def __del__(self) -> None:
        self.close()

    def ask(self, request: Request, take: Callable[[Line, int], T], *, slow: bool = False) -> T:
        """What `take` makes of the answer, given its length; the error that the answer is; StorageError if gone."""
        line, length = self.begin(request, slow=slow)
        try:
            result = take(line, length)
        except OSError as error:
            raise self.lost(line, error) from error
        self.give(line)
        return result

    def begin(self, request: Request, *, slow: bool = False) -> tuple[Line, int]:
        """Send `request`; the connection and the bytes that follow the answer."""
        data = request.packed()
        while True:
            line, used = self._line()
            try:
                line.send(data)
                return line, self.answered(line, slow=slow)
            except UcpError:
                raise
            except OSError as error:
                if not used or isinstance(error, TimeoutError):
                    raise self.lost(line, error) from error
                line.close()  # the node may have closed it while it was idle

    def answered(self, line: Line, *, slow: bool = False) -> int:
        """The bytes that follow the answer; raises the error that it is, with the node's name."""
        try:
            slowest = self.timeout * _DISK_FACTOR + (self.sent - self.flushed) / _SLOWEST_DISK
            return line.answered(slowest if slow else None)
        except UcpError as error:
            self.give(line)
            raise type(error)(f"node {self.name}: {error.message}", hint=error.hint) from None

    def lost(self, line: Line | None, error: OSError) -> StorageError:
        """The node is gone, as `error` tells."""
        if line is not None:
            line.close()
        self._why = f"node {self.name} is gone ({type(error).__name__}: {error})"
        self._gone_until = time.monotonic() + self.timeout
        TRAFFIC.failed("nodes", "get")
        return StorageError(self._why, hint="what it held is read from other nodes that have copies")

    def give(self, line: Line) -> None:
        """Keep a connection for the next request."""
        with self._lock:
            if self._process == os.getpid() and len(self._idle) < _IDLE:
                self._idle.append(line)
                return
        line.close()

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes of objects."""
        with self._lock:
            self.sent, self.received = self.sent + sent, self.received + received
        TRAFFIC.request("nodes", "part" if sent else "get", received, sent)

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._process != os.getpid():
            self._let_go()
            return
        with self._lock:
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()

    def _let_go(self) -> None:
        """Connections are the parent's, which goes on using them, and the lock may be held for ever in this copy."""
        for line in self._idle:
            line.socket.close()
        self._idle = []
        self._lock, self._process = threading.Lock(), os.getpid()

    def _line(self) -> tuple[Line, bool]:
        """A connection, and whether it was used before."""
        if self._process != os.getpid():
            self._let_go()
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        if time.monotonic() < self._gone_until:
            raise StorageError(self._why, hint="it did not answer a moment ago")
        host, port, secret = self.address
        made: Line | None = None
        try:
            made = Line(socket.create_connection((host, port), timeout=self.timeout), self.timeout)
            made.send(secret)
        except OSError as error:
            raise self.lost(made, error) from error
        self._gone_until = 0.0
        return made, False
