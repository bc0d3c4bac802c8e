"""What goes over a connection to a rank's memory: a request names ranges of equal length, the answer is their bytes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from ucp.errors import StorageError

SECRET_BYTES = 32
MOST_RANGES = 1 << 16
"""In one request; longer lists are several."""

MOST_BYTES = 64 << 20
"""In one answer to several ranges, so that a wrong request cannot make a server hold more."""

OK, UNKNOWN, OUTSIDE = b"\0", b"\1", b"\2"
"""First byte of an answer: bytes follow; no such memory (any more); a range outside of it."""

_HEAD = struct.Struct("<16sQI")
"""Which memory, bytes of each range, how many ranges; the ranges' first bytes follow as 64-bit numbers."""


def request(memory: bytes, length: int, offsets: Sequence[int]) -> bytes:
    """The bytes of a request for `length` bytes from each of `offsets`."""
    return _HEAD.pack(memory, length, len(offsets)) + struct.pack(f"<{len(offsets)}Q", *offsets)


def read_request(connection: socket.socket) -> tuple[bytes, int, tuple[int, ...]] | None:
    """The next request, None at the end of the connection; StorageError for one that nobody of us sends."""
    head = bytearray(_HEAD.size)
    if not _fill(connection, memoryview(head)):
        return None
    memory, length, count = _HEAD.unpack(head)
    if count > MOST_RANGES or (count > 1 and length * count > MOST_BYTES):
        raise StorageError(f"a request for {count} ranges of {length} bytes is not one of ours")
    rest = bytearray(8 * count)
    if not _fill(connection, memoryview(rest)):
        return None
    return memory, length, struct.unpack(f"<{count}Q", rest)


def receive(connection: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer`; ConnectionError if the other side ends before."""
    if not _fill(connection, buffer):
        raise ConnectionResetError("closed by the other side")


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    done = 0
    while done < len(buffer):
        count = connection.recv_into(buffer[done:])
        if count == 0:
            return False
        done += count
    return True
