"""A checkpoint together with what it shares with others: objects of a folder beside it, under a prefix of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ucp.errors import UsageError
from ucp.store.base import Buffer, Entry, Store, Writer


class MountedStore(Store):
    """The objects of `store`, and under ``<prefix>/`` those of `pool` that `names` tells.

    What is mounted can be read, not written: others use it as well.
    """

    def __init__(self, store: Store, pool: Store, names: Iterable[str], prefix: str = "shared") -> None:
        self.store, self.pool, self.prefix = store, pool, f"{prefix}/"
        self.names = frozenset(names)
        self.url = store.url
        self.parallel, self.conditional, self.locks = store.parallel, store.conditional, store.locks
        self.lists = store.lists and pool.lists

    def entry(self, path: str) -> Entry:
        name = self._mounted(path)
        return self.store.entry(path) if name is None else self._entry(self.pool.entry(name))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        found = [] if prefix.startswith(self.prefix) else list(self.store.entries(prefix))
        if prefix.startswith(self.prefix) or self.prefix.startswith(prefix):
            rest = prefix[len(self.prefix) :]
            held = (self._entry(entry) for entry in self.pool.entries(rest) if entry.path in self.names)
            own = (entry for entry in found if not entry.path.startswith(self.prefix))
            found = sorted((*own, *held), key=lambda entry: entry.path)
        yield from found

    def children(self, path: str = "") -> list[str]:
        if f"{path}/" == self.prefix:
            return sorted(name for name in self.pool.children() if name in self.names)
        here = self.store.children(path)
        return sorted({*here, self.prefix}) if not path else here

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        store, path = self._place(path)
        store.read_into(path, offset, buffer)

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        store, path = self._place(path)
        store.read_runs(path, offsets, length, buffer)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        store, path = self._place(path)
        store.read_ranges(path, ranges)

    def create(self, path: str, size: int) -> Writer:
        return self._writable(path).create(path, size)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        self._writable(path).put(path, data, if_absent=if_absent, if_match=if_match, durable=durable)

    def delete(self, path: str) -> None:
        self._writable(path).delete(path)

    def child(self, path: str) -> Store:
        return self.store.child(path)

    def sibling(self, name: str) -> Store:
        return self.store.sibling(name)

    def flush(self, paths: Sequence[str]) -> None:
        self.store.flush([path for path in paths if self._mounted(path) is None])

    def tidy(self) -> None:
        self.store.tidy()

    def overlaps(self, other: Store) -> bool:
        """Whether one of the two folders lies in the other, or what is mounted and the other do."""
        return self.store.overlaps(other) or self.pool.overlaps(other)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self.store.exclusive():
            yield

    def close(self) -> None:
        self.store.close()
        self.pool.close()

    def _mounted(self, path: str) -> str | None:
        name = path[len(self.prefix) :]
        return name if path.startswith(self.prefix) and name in self.names else None

    def _place(self, path: str) -> tuple[Store, str]:
        name = self._mounted(path)
        return (self.store, path) if name is None else (self.pool, name)

    def _entry(self, entry: Entry) -> Entry:
        return Entry(f"{self.prefix}{entry.path}", entry.size, entry.fingerprint)

    def _writable(self, path: str) -> Store:
        if path.startswith(self.prefix):
            raise UsageError(f"{self.url}/{path}: is shared with other checkpoints and never changed")
        return self.store


__all__ = ["MountedStore"]
