"""The side that has the folder: threads that read and write it for other nodes which know the secret."""

from __future__ import annotations

import hmac
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, NamedTuple

from ucp.elastic.nodes.folder import NodeFolder
from ucp.elastic.nodes.wire import (
    COMMIT,
    DURABLE,
    IF_ABSENT,
    IF_MATCH,
    SECRET_BYTES,
    WHOLE,
    Line,
    Op,
    Request,
    new_secret,
)
from ucp.errors import CorruptError, StorageError, UcpError, UsageError
from ucp.store import Entry, Writer
from ucp.train.peers.server import own_address

_PATIENCE_SECONDS = 60.0
"""Without a byte in the middle of a request. Whoever writes may have to wait for another node meanwhile."""

_STRANGERS = 64
"""Most connections at once of those that have not said the secret yet, for which they have `_KNOCK_SECONDS`."""

_KNOCK_SECONDS = 10.0
_CONNECTIONS = 4096
_BUFFER_BYTES = 1 << 20
_SMALL_BYTES = 64 << 10
"""Ranges up to this size are sent together."""

_CUT = "the object was cut while it was sent"


class Address(NamedTuple):
    """Where a node's server is, and what it wants to hear first."""

    host: str
    port: int
    secret: bytes


class NodeServer:
    """Serves `folder` to who knows the random secret in `address`: objects below it, and nothing is ever carried out.

    Each connection has a thread and a buffer of 1 MiB at most; what is read goes straight from the file.
    """

    def __init__(self, folder: NodeFolder, host: str | None = None) -> None:
        self.folder = folder
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(_STRANGERS)
        self._closed = False
        host = host or own_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=512)
        except OSError as error:
            raise StorageError(
                f"a node cannot be served at {host}: {error.strerror or error}",
                hint="it is the address that leads to MASTER_ADDR: see how this host reaches that one",
            ) from error
        self.address = Address(host, self._listener.getsockname()[1], new_secret())
        _SERVERS.add(self)
        threading.Thread(target=self._accept, name="ucp-node", daemon=True).start()

    def close(self) -> None:
        """Stop; whoever is connected is cut off, and what it was writing is not there."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.close()

    def forked(self) -> None:
        """Let go, in a child process, of what is the parent's: a child that lives longer would seem to be the node."""
        self._listener.close()
        for line in self._lines:
            line.socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(0.05)  # out of descriptors, perhaps; closed, if not
                continue
            self._strangers.acquire()
            try:
                threading.Thread(target=self._serve, args=(connection,), name="ucp-node", daemon=True).start()
            except (RuntimeError, MemoryError):  # the next one may have more luck
                self._strangers.release()
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        line = None
        try:
            try:
                line = self._admitted(connection)
            finally:
                self._strangers.release()
            if line is not None:
                while (request := line.request()) is not None:
                    self._answer(line, request)
        except (OSError, UcpError, ValueError, ArithmeticError, MemoryError):  # gone, too slow, or not one of us
            pass
        finally:
            connection.close()
            with self._lock:
                self._lines.discard(line) if line is not None else None

    def _admitted(self, connection: socket.socket) -> Line | None:
        line = Line(connection, _KNOCK_SECONDS)
        if not hmac.compare_digest(line.receive(SECRET_BYTES), self.address.secret):
            return None
        line.patience = _PATIENCE_SECONDS
        with self._lock:
            if self._closed or len(self._lines) >= _CONNECTIONS:
                return None
            self._lines.add(line)
        return line

    def _answer(self, line: Line, request: Request) -> None:
        if request.op is Op.READ:
            self._read(line, request)
        elif request.op is Op.WRITE:
            self._write(line, request)
        else:
            try:
                data = self._told(request)
            except UcpError as error:
                line.refuse(error)
            except (ValueError, TypeError, RecursionError):  # a path that no system takes, or a list that is none
                line.refuse(UsageError("a request that nobody can answer"))
            else:
                line.answer(data=data)

    def _told(self, request: Request) -> bytes:
        folder, path = self.folder, request.path
        match request.op:
            case Op.ENTRY:
                return _rows([folder.entry(path)])
            case Op.ENTRIES:
                return _rows(folder.entries(path))
            case Op.CHILDREN:
                return json.dumps(folder.children(path)).encode()
            case Op.ROOM:
                return str(folder.room()).encode()
            case Op.DELETE:
                folder.delete(path)
            case Op.CLEAR:
                folder.clear(path)
            case Op.TIDY:
                folder.tidy()
            case Op.FLUSH:
                folder.flush([str(name) for name in json.loads(request.extra)])
        return b""

    def _read(self, line: Line, request: Request) -> None:
        try:
            file = self.folder.opened(request.path)
        except UcpError as error:
            line.refuse(error)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            ranges = request.ranges
            if request.flags & WHOLE:
                ranges = ((request.size, max(0, size - request.size)),)
            try:
                _check_inside(request.path, ranges, size)
            except CorruptError as error:
                line.refuse(error)
                return
            line.answer(sum(length for _, length in ranges))
            _send(line, file, ranges)

    def _write(self, line: Line, request: Request) -> None:
        flags = request.flags
        try:
            writer = self.folder.create(
                request.path,
                request.size,
                stamp=request.stamp,
                if_absent=bool(flags & IF_ABSENT),
                if_match=request.extra if flags & IF_MATCH else None,
                durable=bool(flags & DURABLE),
            )
        except UcpError as error:
            line.refuse(error)
            return
        try:
            line.answer()
            failed = _take(line, writer, request.size)
        except BaseException:
            writer.abort()
            raise
        try:
            if failed is not None:
                raise failed
            writer.close()
        except UcpError as error:
            writer.abort()
            line.refuse(error)
        else:
            line.answer()


def _take(line: Line, writer: Writer, size: int) -> UcpError | None:
    """All bytes of an object, and the word that it is to get its name; what went wrong with writing them.

    Who sends them does not listen before the end: until then they are taken and thrown away.
    """
    buffer, at, failed = memoryview(bytearray(min(size, _BUFFER_BYTES))), 0, None
    while at < size:
        piece = buffer[: min(len(buffer), size - at)]
        line.fill(piece)
        if failed is None:
            try:
                writer.write_at(at, piece)
            except UcpError as error:
                failed = error
        at += len(piece)
    if line.receive(len(COMMIT)) != COMMIT:
        raise StorageError("an object that was not ended")
    return failed


def _check_inside(path: str, ranges: Iterable[tuple[int, int]], size: int) -> None:
    for offset, length in ranges:
        if offset + length > size:
            raise CorruptError(f"{path}: ends at byte {size}, {offset + length - size} bytes early")


def _send(line: Line, file: IO[bytes], ranges: Iterable[tuple[int, int]]) -> None:
    """Bytes of a file: small ranges gathered, others straight from the file to the connection."""
    held = bytearray()
    for offset, length in ranges:
        if length <= _SMALL_BYTES:
            piece = os.pread(file.fileno(), length, offset)
            if len(piece) != length:
                raise ConnectionAbortedError(_CUT)
            held += piece
        if held and (length > _SMALL_BYTES or len(held) >= _BUFFER_BYTES):
            line.send(bytes(held))
            held.clear()
        if length > _SMALL_BYTES:
            for start in range(offset, offset + length, _BUFFER_BYTES * 4):
                count = min(_BUFFER_BYTES * 4, offset + length - start)
                if line.socket.sendfile(file, start, count) != count:
                    raise ConnectionAbortedError(_CUT)
    if held:
        line.send(bytes(held))


def _rows(entries: Iterable[Entry]) -> bytes:
    return json.dumps([(entry.path, entry.size, entry.fingerprint) for entry in entries]).encode()


_SERVERS: weakref.WeakSet[NodeServer] = weakref.WeakSet()


def _forked() -> None:
    for server in list(_SERVERS):
        server.forked()
    _SERVERS.clear()


os.register_at_fork(after_in_child=_forked)
