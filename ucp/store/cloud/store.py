"""A folder of a bucket as a store: S3, Google Cloud Storage, Azure, and what speaks like them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ucp.errors import NotFoundError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.cloud.address import Address
from ucp.store.cloud.client import CONCURRENCY, Client, connect
from ucp.store.cloud.failure import Kind, RequestError
from ucp.store.cloud.options import Options
from ucp.store.cloud.pool import spread
from ucp.store.cloud.ranges import fetches
from ucp.store.cloud.reading import read_fetches, read_rest
from ucp.store.cloud.retry import Trial
from ucp.store.cloud.writing import writer
from ucp.store.errors import exists_already, replaced_meanwhile

T = TypeVar("T")


class CloudStore(Store):
    """A folder of a bucket. Credentials are found by each process for itself, and are no part of the store."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self.options = options
        self.url = address.url
        self._connected: tuple[int, Client] | None = None

    def __reduce__(self) -> tuple[type[CloudStore], tuple[Address, Options]]:
        return (CloudStore, (self.address, self.options))

    @property
    def parallel(self) -> int:  # type: ignore[override]
        """How many requests at once pay, as the options say."""
        return self.options.resolved(self.address.bucket).concurrency or CONCURRENCY

    @property
    def client(self) -> Client:
        """The client of the bucket, which this process's stores of it share."""
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), connect(self.address, self.options))
        return self._connected[1]

    def entry(self, path: str) -> Entry:
        key = self._object(path)
        return entry_of(path, self._ask(path, "head", lambda client: client.head(key)))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        folder = self.address.key(prefix.rpartition("/")[0])
        found = self._ask(prefix, "list", lambda client: client.list(folder))
        skip = len(self.address.prefix) + 1 if self.address.prefix else 0
        entries = [entry_of(meta["path"][skip:], meta) for meta in found if meta["path"] != folder]
        wanted = [entry for entry in entries if entry.path.startswith(prefix)]
        yield from sorted(self._without_markers(wanted), key=lambda entry: entry.path)

    def _without_markers(self, entries: list[Entry]) -> list[Entry]:
        """`entries` without the empty objects ``folder/`` by which consoles show folders; a list calls them ``folder``.

        So that no folder is taken for an object, those that are empty are looked at one by one.
        """
        empty = [entry.path for entry in entries if entry.size == 0]
        gone: set[str] = set()

        def look(path: str) -> None:
            if not self.exists(path):
                gone.add(path)

        if empty:
            spread([lambda path=path: look(path) for path in empty], self.parallel)  # type: ignore[misc]
        return [entry for entry in entries if entry.path not in gone]

    def children(self, path: str = "") -> list[str]:
        folder = self.address.key(path.rstrip("/"))
        found = self._ask(path, "list", lambda client: client.level(folder))
        skip = len(folder) + 1 if folder else 0
        folders = {name.rstrip("/")[skip:] + "/" for name in found["common_prefixes"]}
        return sorted(folders | {meta["path"][skip:] for meta in found["objects"] if meta["path"] != folder})

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.read_ranges(path, [(offset, memoryview(buffer).cast("B"))])

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        self.read_ranges(path, [(at, buffer[n * length : (n + 1) * length]) for n, at in enumerate(offsets)])

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        key = self._object(path)
        wanted = fetches(ranges)
        if wanted:
            read_fetches(self.client, key, wanted, name=self._name(path))
        else:
            self.entry(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None:
            return super().read(path, offset, length)
        return read_rest(self.client, self._object(path), offset, name=self._name(path))

    def create(self, path: str, size: int) -> Writer:
        return writer(self.client, self._object(path), size, name=self._name(path))

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        key, trial, client = self._object(path), Trial(), self.client
        try:
            client.put(key, data, if_absent=if_absent, if_match=if_match, trial=trial)
            return
        except RequestError as error:
            failed = error
        kind = failed.failure.kind
        if kind is not Kind.CONDITION and not (if_match is not None and kind is Kind.MISSING):
            raise failed.public(self._name(path)) from None
        if trial.unsure and self._holds(path, data):
            return  # an attempt whose answer was lost had worked: the conflict is one with ourselves
        raise exists_already(self._name(path)) if if_absent else replaced_meanwhile(self._name(path))

    def _holds(self, path: str, data: Buffer) -> bool:
        try:
            return self.read(path) == bytes(data)
        except NotFoundError:
            return False

    def delete(self, path: str) -> None:
        key = self._object(path)
        try:
            self._ask(path, "delete", lambda client: client.delete(key))
        except NotFoundError:
            return

    def child(self, path: str) -> CloudStore:
        return CloudStore(self.address.child(path), self.options) if path else self

    def sibling(self, name: str) -> Store:
        top, _, last = self.address.prefix.rpartition("/")
        if not last:
            return super().sibling(name)
        return CloudStore(replace(self.address, prefix=top), self.options).child(name)

    def overlaps(self, other: Store) -> bool:
        if not isinstance(other, CloudStore) or self.options.endpoint != other.options.endpoint:
            return False
        return inside(self.url, other.url) or inside(other.url, self.url)

    def _ask(self, path: str, operation: str, call: Callable[[Client], T]) -> T:
        client = self.client
        try:
            return client.persistently(operation, lambda: call(client))
        except RequestError as error:
            failed = error
        raise failed.public(self._name(path)) from None

    def _object(self, path: str) -> str:
        """The key of an object, which a folder has not."""
        if not path:
            raise NotFoundError(f"{self.url}: a folder and no object")
        return self.address.key(path)

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url


def entry_of(path: str, meta: dict[str, Any]) -> Entry:
    """What the client tells of an object, as an entry.

    The ETag is what lists and single answers have in common; it has no quotes in some lists.
    """
    tag = (meta["e_tag"] or "").strip('"')
    return Entry(path, meta["size"], tag or f"{meta['size']}-{meta['last_modified'].timestamp():.0f}")
