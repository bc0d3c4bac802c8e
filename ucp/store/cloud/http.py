"""A folder on a web server as a store: read only, by ranges, without lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NoReturn
from urllib.parse import quote, urlsplit

from ucp.errors import UsageError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.cloud.client import CONCURRENCY, Client, connect_http
from ucp.store.cloud.failure import Kind, RequestError
from ucp.store.cloud.keys import check_path
from ucp.store.cloud.options import Options
from ucp.store.cloud.pool import spread
from ucp.store.cloud.ranges import fetches
from ucp.store.cloud.reading import read_fetches, read_rest
from ucp.store.cloud.store import entry_of
from ucp.store.errors import without_secrets

_HEAD_FAILS = (Kind.DENIED, Kind.REFUSED, Kind.SERVER)
"""Signed URLs are often good for GET alone, and some servers know nothing else."""


class HttpStore(Store):
    """A folder below an ``https://`` or ``http://`` URL, whose path is percent-encoded as URLs are.

    A query, such as a signature, is sent with every request and never shown. The server must serve ranges. What is
    `known` to lie in the folder is what a list shows.
    """

    conditional = False
    lists = False

    def __init__(self, address: str, options: Options, known: tuple[str, ...] | None = None) -> None:
        path, sign, query = address.partition("?")
        self.address = path.rstrip("/") + sign + query
        self.options = options
        self.known = known
        self._connected: tuple[int, Client] | None = None
        self.url = without_secrets(path.rstrip("/"))
        parts = urlsplit(address)
        if not parts.hostname:
            raise UsageError(f"{self.url} names no server", hint="https://server/folder is one")

    def __reduce__(self) -> tuple[type[HttpStore], tuple[str, Options, tuple[str, ...] | None]]:
        return (HttpStore, (self.address, self.options, self.known))

    def knowing(self, paths: Iterable[str]) -> HttpStore:
        """The same folder, which lists those of `paths` that are there."""
        return HttpStore(self.address, self.options, tuple(self.found(paths)))

    def found(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` at which there is an object, sorted."""
        there: list[str] = []

        def look(path: str) -> None:
            if self.exists(path):
                there.append(path)

        spread([partial(look, path) for path in paths], self.parallel)
        return sorted(there)

    @property
    def parallel(self) -> int:  # type: ignore[override]
        """How many requests at once pay, as the options say."""
        return self.options.resolved().concurrency or CONCURRENCY

    @property
    def _client(self) -> Client:
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), connect_http(self.address, self.options))
        return self._connected[1]

    def entry(self, path: str) -> Entry:
        try:
            return self._look(path)
        except RequestError as error:
            failed = error
        raise failed.public(f"{self.url}/{path}") from None

    def exists(self, path: str) -> bool:
        """Whether there is an object; what may not be read is as good as none: some servers do not tell the two."""
        try:
            self._look(path)
        except RequestError as error:
            if error.failure.kind in (Kind.MISSING, Kind.DENIED):
                return False
            failed = error
        else:
            return True
        raise failed.public(f"{self.url}/{path}") from None

    def _look(self, path: str) -> Entry:
        client, key = self._client, self._object(path)
        try:
            return entry_of(path, client.persistently("head", lambda: client.head(key)))
        except RequestError as error:
            if error.failure.kind not in _HEAD_FAILS:
                raise
        return entry_of(path, client.persistently("get", lambda: client.peek(key), read=1))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        yield from (self.entry(path) for path in self._listed() if path.startswith(prefix))

    def children(self, path: str = "") -> list[str]:
        check_path(path, self.url)
        skip = len(path) + 1 if path else 0
        rests = [name[skip:] for name in self._listed() if inside(name, path) or not path]
        return sorted({rest.partition("/")[0] + rest.partition("/")[1] for rest in rests} - {""})

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.read_ranges(path, [(offset, memoryview(buffer).cast("B"))])

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        self.read_ranges(path, [(at, buffer[n * length : (n + 1) * length]) for n, at in enumerate(offsets)])

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        key, wanted = self._object(path), fetches(ranges)
        if wanted:
            read_fetches(self._client, key, wanted, name=f"{self.url}/{path}")
        else:
            self.entry(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None:
            return super().read(path, offset, length)
        return read_rest(self._client, self._object(path), offset, name=f"{self.url}/{path}")

    def create(self, path: str, size: int) -> Writer:
        self._read_only(path)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        self._read_only(path)

    def delete(self, path: str) -> None:
        self._read_only(path)

    def child(self, path: str) -> HttpStore:
        check_path(path.rstrip("/"), self.url)
        top, sign, query = self.address.partition("?")
        return HttpStore(f"{top}/{quote(path)}{sign}{query}", self.options) if path else self

    def sibling(self, name: str) -> Store:
        path, sign, query = self.address.partition("?")
        top = path.rpartition("/")[0]
        if top.endswith("/"):
            return super().sibling(name)
        return HttpStore(f"{top}{sign}{query}", self.options).child(name)

    def overlaps(self, other: Store) -> bool:
        return isinstance(other, HttpStore) and (inside(self.url, other.url) or inside(other.url, self.url))

    def _object(self, path: str) -> str:
        check_path(path, self.url)
        return path

    def _listed(self) -> tuple[str, ...]:
        if self.known is None:
            raise UsageError(
                f"{self.url}: what lies in a folder cannot be asked over HTTP",
                hint="name the URL of a file, or copy the folder to a store that lists",
            )
        return self.known

    def _read_only(self, path: str) -> NoReturn:
        check_path(path, self.url)
        raise UsageError(f"{self.url}: nothing can be written over HTTP", hint="choose another destination")
