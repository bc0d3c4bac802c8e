"""The side that asks: the folder of another node as a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ucp.elastic.nodes.link import TIMEOUT_SECONDS, Link
from ucp.elastic.nodes.member import Member
from ucp.elastic.nodes.server import Address
from ucp.elastic.nodes.whole import check_all, check_order, new_stamp
from ucp.elastic.nodes.wire import (
    COMMIT,
    DURABLE,
    IF_ABSENT,
    IF_MATCH,
    MOST_TEXT,
    WHOLE,
    Line,
    Op,
    Request,
    cut,
)
from ucp.errors import CorruptError, StorageError, UcpError, UsageError
from ucp.store import Buffer, Entry, Writer

T = TypeVar("T")

_SMALL_BYTES = 4 << 10
_TOGETHER = 256
"""So many ranges of so many bytes are received at once."""


class RemoteNode(Member):
    """What lies in the folder of node `name`. StorageError that names the node when it is gone or does not answer."""

    parallel = 4

    def __init__(self, name: str, address: Address, *, timeout: float = TIMEOUT_SECONDS, path: str = "") -> None:
        self.name, self.path = name, path
        self.link = Link(name, address, timeout)
        self.url = f"nodes://{name}/{path}".rstrip("/")

    def entry(self, path: str) -> Entry:
        return self._json(
            Request(Op.ENTRY, self._at(path)), lambda found: Entry(path, int(found[0][1]), str(found[0][2]))
        )

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        skip = len(self.path) + 1 if self.path else 0
        yield from (replace(entry, path=entry.path[skip:]) for entry in self._list(prefix))

    def children(self, path: str = "") -> list[str]:
        return self._json(Request(Op.CHILDREN, self._at(path)), lambda found: [str(name) for name in _listed(found)])

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.read_ranges(path, [(offset, memoryview(buffer))])

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        parts = ((offset, buffer[at * length : (at + 1) * length]) for at, offset in enumerate(offsets))
        self.read_ranges(path, list(parts))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        for some in cut([(offset, view.cast("B")) for offset, view in ranges]):
            request = Request(Op.READ, self._at(path), ranges=tuple((offset, len(view)) for offset, view in some))
            self.link.ask(request, lambda line, length, some=some: _fill(line, length, some))  # type: ignore[misc]
            self.link.count(received=sum(len(view) for _, view in some))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None:
            return super().read(path, offset, length)

        def take(line: Line, size: int) -> bytes:
            try:
                return line.receive(size)
            except (MemoryError, OverflowError) as error:
                raise ConnectionAbortedError(f"there is no room for {size} bytes") from error

        data = self.link.ask(Request(Op.READ, self._at(path), flags=WHOLE, size=offset), take)
        self.link.count(received=len(data))
        return data

    def create(
        self,
        path: str,
        size: int,
        *,
        stamp: int | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
        durable: bool = False,
    ) -> Writer:
        flags = (IF_ABSENT if if_absent else 0) | (IF_MATCH if if_match is not None else 0) | (DURABLE * durable)
        request = Request(
            Op.WRITE, self._at(path), flags=flags, size=size, stamp=stamp or new_stamp(), extra=if_match or ""
        )
        return _RemoteWriter(self.link, path, request)

    def delete(self, path: str) -> None:
        self._do(Request(Op.DELETE, self._at(path)))

    def clear(self, path: str) -> None:
        self._do(Request(Op.CLEAR, self._at(path)), slow=True)

    def flush(self, paths: Sequence[str]) -> None:
        if paths:
            sent = self.link.sent
            self._do(Request(Op.FLUSH, extra=json.dumps([self._at(path) for path in paths])), slow=True)
            self.link.flushed = sent

    def tidy(self) -> None:
        self._do(Request(Op.TIDY), slow=True)

    def room(self) -> int:
        return self._json(Request(Op.ROOM), int)

    def child(self, path: str) -> RemoteNode:
        return self._beside(self._at(path))

    def sibling(self, name: str) -> RemoteNode:
        parent = self.path.rpartition("/")[0]
        return self._beside(f"{parent}/{name}" if parent else name)

    def close(self) -> None:
        self.link.close()

    def _beside(self, path: str) -> RemoteNode:
        other = RemoteNode(self.name, self.link.address, timeout=self.link.timeout, path=path)
        other.link = self.link
        return other

    def _at(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.url}")
        return f"{self.path}/{path}" if self.path and path else self.path or path

    def _list(self, prefix: str) -> list[Entry]:
        # A prefix keeps its slash: what is asked for is below a folder, not beside it.
        at = f"{self.path}/{prefix}" if self.path else prefix
        self._at(prefix)
        return self._json(
            Request(Op.ENTRIES, at),
            lambda found: [Entry(str(name), int(size), str(mark)) for name, size, mark in _listed(found)],
        )

    def _json(self, request: Request, parse: Callable[[Any], T]) -> T:
        def take(line: Line, length: int) -> bytes:
            if length > MOST_TEXT:
                raise ConnectionAbortedError(f"a list of {length} bytes is not one of ours")
            return line.receive(length)

        data = self.link.ask(request, take)
        try:
            return parse(json.loads(data))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise CorruptError(f"node {self.name}: an answer that is not one of ours ({error})") from error

    def _do(self, request: Request, *, slow: bool = False) -> None:
        self.link.ask(request, _nothing, slow=slow)


class _RemoteWriter(Writer):
    """Sends an object as it is written; what has not all arrived never gets its name."""

    def __init__(self, link: Link, path: str, request: Request) -> None:
        self.link, self.path, self.size, self.at = link, path, request.size, 0
        self.durable = bool(request.flags & DURABLE)
        line, length = link.begin(request)
        try:
            _nothing(line, length)
        except OSError as error:
            raise link.lost(line, error) from error
        self._line: Line | None = line

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        check_order(self.path, self.at, offset, len(view), self.size)
        line = self._alive()
        try:
            line.send(view, more=self.at + len(view) == self.size)
        except OSError as error:
            self._line = None
            raise self.link.lost(line, error) from error
        self.at += len(view)
        self.link.count(sent=len(view))

    def close(self) -> None:
        try:
            check_all(self.path, self.at, self.size)
            line = self._alive()
            try:
                line.send(COMMIT)
                self._line = None
                self.link.answered(line, slow=self.durable)
            except UcpError:
                raise
            except OSError as error:
                raise self.link.lost(line, error) from error
        except BaseException:
            self.abort()
            raise
        self.link.give(line)

    def abort(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _alive(self) -> Line:
        if self._line is None:
            raise StorageError(f"node {self.link.name}: {self.path} was given up")
        return self._line


def _nothing(_line: Line, length: int) -> None:
    """All that there is to hear was yes."""
    if length:
        raise ConnectionAbortedError("an answer that is not one of ours")


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise TypeError("no list")
    return found


def _fill(line: Line, length: int, ranges: Sequence[tuple[int, memoryview]]) -> None:
    """Receive the `length` bytes of `ranges`, small ones together."""
    _nothing(line, length - sum(len(view) for _, view in ranges))
    few: list[memoryview] = []
    for _, view in ranges:
        if len(view) <= _SMALL_BYTES:
            few.append(view)
        if few and (len(view) > _SMALL_BYTES or len(few) == _TOGETHER):
            _scatter(line, few)
            few = []
        if len(view) > _SMALL_BYTES:
            line.fill(view)
    _scatter(line, few)


def _scatter(line: Line, views: Sequence[memoryview]) -> None:
    data, at = line.receive(sum(map(len, views))), 0
    for view in views:
        view[:] = data[at : at + len(view)]
        at += len(view)
