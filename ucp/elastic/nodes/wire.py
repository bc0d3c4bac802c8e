"""What goes between nodes: a request with a path, an answer with its bytes, or an error by class and text.

Nothing that comes in is ever more than numbers, text and bytes, each of bounded size.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ucp.errors import ConflictError, CorruptError, NotFoundError, StorageError, UcpError, UsageError

SECRET_BYTES = 32
MOST_RANGES = 1 << 16
"""In one request; longer lists are several."""

MOST_EXTRA = 16 << 20
"""Bytes of text in a request."""

MOST_TEXT = 1 << 28
"""Bytes of text in an answer, such as a list of objects."""

MOST_MESSAGE = 1 << 12
"""Characters of an error's message."""

_SLICE = 4 << 20
"""Bytes that one time limit is for when sending."""

_SLOWEST = 1 << 20
"""Bytes per second; whoever sends fewer for long is taken for gone."""

_HEAD = struct.Struct("<BBHIQqI")
_RANGE = struct.Struct("<QQ")
_ANSWER = struct.Struct("<BQ")
_MORE: Final[int] = getattr(socket, "MSG_MORE", 0)

COMMIT = b"C"
"""Follows the last byte of an object that is to get its name."""


class Op(IntEnum):
    """What a request asks for."""

    ENTRY = 1
    ENTRIES = 2
    CHILDREN = 3
    READ = 4
    WRITE = 5
    DELETE = 6
    CLEAR = 7
    FLUSH = 8
    TIDY = 9
    ROOM = 10


IF_ABSENT, IF_MATCH, DURABLE, WHOLE = 1, 2, 4, 8
"""Flags: conditions of a write, that it is to be durable; that all from an offset on is read."""

_CLASSES: tuple[type[UcpError], ...] = (UcpError, NotFoundError, CorruptError, ConflictError, UsageError, StorageError)
"""Of errors, by the first byte of an answer; 0 is none."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request: `size` bytes are to be written, or are the offset to read from; `extra` is a condition or a list."""

    op: Op
    path: str = ""
    flags: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    size: int = 0
    stamp: int = 0
    extra: str = ""

    def packed(self) -> bytes:
        """Its bytes."""
        path, extra = _encoded(self.path), _encoded(self.extra)
        if len(path) >= 1 << 16:
            raise NotFoundError(f"{self.path:.300}: no such object (the name is too long)")
        if len(extra) > MOST_EXTRA or len(self.ranges) > MOST_RANGES:
            raise UsageError("too much for one request")
        head = _HEAD.pack(self.op, self.flags, len(path), len(self.ranges), self.size, self.stamp, len(extra))
        return b"".join([head, path, extra, *(_RANGE.pack(*one) for one in self.ranges)])


class Line:
    """A connection to another node: no wait is longer than `patience` seconds without a byte, or endless in drops."""

    def __init__(self, connection: socket.socket, patience: float) -> None:
        self.socket, self.patience = connection, patience
        connection.settimeout(patience)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            with suppress(AttributeError, OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, data: bytes | memoryview, *, more: bool = False) -> None:
        """Send all of it; `more` follows at once."""
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            self.socket.sendall(view[start : start + _SLICE], _MORE if more else 0)

    def fill(self, buffer: memoryview, patience: float | None = None) -> None:
        """Receive until `buffer` is full; ConnectionError if the other side ends before, TimeoutError if it hangs."""
        if not self._fill(buffer, patience or self.patience):
            raise ConnectionResetError("closed by the other side")

    def _fill(self, buffer: memoryview, patience: float) -> bool:
        end, done = time.monotonic() + patience + len(buffer) / _SLOWEST, 0
        while done < len(buffer):
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("too slow")
            self.socket.settimeout(min(patience, left))
            count = self.socket.recv_into(buffer[done:])
            if count == 0:
                return False
            done += count
        self.socket.settimeout(self.patience)
        return True

    def receive(self, length: int, patience: float | None = None) -> bytes:
        """`length` bytes, of which the caller has checked that they are not too many."""
        data = bytearray(length)
        self.fill(memoryview(data), patience)
        return bytes(data)

    def request(self) -> Request | None:
        """The next request, for which there is no time limit; None at the end; StorageError for one of nobody of us."""
        self.socket.settimeout(None)
        first = self.socket.recv(1)
        if not first:
            return None
        op, flags, path, count, size, stamp, extra = _HEAD.unpack(first + self.receive(_HEAD.size - 1))
        if op not in Op._value2member_map_ or count > MOST_RANGES or extra > MOST_EXTRA:
            raise StorageError("a request that is not one of ours")
        name, text = _decoded(self.receive(path)), _decoded(self.receive(extra))
        ranges = tuple(_RANGE.iter_unpack(self.receive(count * _RANGE.size)))
        return Request(Op(op), name, flags, ranges, size, stamp, text)

    def answer(self, length: int = 0, data: bytes = b"") -> None:
        """Say yes; `length` bytes follow, of which `data` are the first."""
        self.send(_ANSWER.pack(0, length or len(data)) + data)

    def refuse(self, error: UcpError) -> None:
        """Say no, and why."""
        number = next((at for at, kind in enumerate(_CLASSES) if at and isinstance(error, kind)), len(_CLASSES) - 1)
        text = _encoded(error.message[:MOST_MESSAGE])
        self.send(_ANSWER.pack(number, len(text)) + text)

    def answered(self, patience: float | None = None) -> int:
        """The bytes that follow the answer; raises the error that it is."""
        number, length = _ANSWER.unpack(self.receive(_ANSWER.size, patience))
        if number == 0:
            return int(length)
        if number >= len(_CLASSES) or length > 4 * MOST_MESSAGE:
            raise ConnectionResetError("an answer that is not one of ours")
        raise _CLASSES[number](_decoded(self.receive(length)))

    def close(self) -> None:
        """Hang up, also for who is waiting on it in another thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def cut(ranges: Sequence[tuple[int, memoryview]]) -> list[Sequence[tuple[int, memoryview]]]:
    """`ranges` as so many requests as they need."""
    return [ranges[at : at + MOST_RANGES] for at in range(0, len(ranges), MOST_RANGES)]


def new_secret() -> bytes:
    """What nobody guesses."""
    return os.urandom(SECRET_BYTES)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
