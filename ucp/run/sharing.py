"""A destination whose large objects go into the pool of its run, where an object of the same content lies only once.

To a conversion it looks like a folder that holds everything by path. What lies in the pool is known, until the root is
put, by empty objects beside the notes of the conversion, ``links/<path>/<name>-<size>``, and from then on by the root.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from ucp.converter import Target
from ucp.errors import NotFoundError, UsageError
from ucp.format.pool import POOL, content_name
from ucp.run.claim import FOLDER
from ucp.share.lease import Lease, Offer, look, put_shared
from ucp.share.references import placed_by, shared_in
from ucp.store import Buffer, Entry, Store, Writer

LINKS = f"{FOLDER}links/"
SHARED_BYTES = 64 << 20
"""Size that objects should have where they are shared: each is put together in memory, before anything is written."""

_LINK = re.compile(re.escape(LINKS) + r"(?P<path>.+)/(?P<name>[0-9a-f]{64})-(?P<size>\d+)")


class SharingStore(Store):
    """`folder`, a checkpoint of a run to be, whose objects lie in the pool beside it; `root` is put last.

    While `exclusive`, it holds a lease on the pool.
    """

    def __init__(self, folder: Store, root: str) -> None:
        self.folder, self.root, self.pool = folder, root, folder.sibling(POOL)
        self.url, self.parallel, self.conditional = folder.url, folder.parallel, folder.conditional
        self.locks, self.lists = folder.locks, folder.lists
        if folder.overlaps(self.pool):
            raise UsageError(f"{folder.url}: is where a run keeps what its checkpoints share", hint="choose another")
        self._lease: Lease | None = None
        self._offer: Offer | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lease": None, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def links(self) -> dict[str, str]:
        """The objects written so far that lie in the pool: name by path."""
        return {path: name for path, (name, _, _) in self._linked().items()}

    def entry(self, path: str) -> Entry:
        try:
            return self.folder.entry(path)
        except NotFoundError:
            if path.startswith(FOLDER) or path not in (found := self._virtual()):
                raise
            return found[path]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        own = {entry.path: entry for entry in self.folder.entries(prefix)}
        if not prefix.startswith(FOLDER):
            own = {**{path: entry for path, entry in self._virtual().items() if path.startswith(prefix)}, **own}
        yield from (own[path] for path in sorted(own))

    def children(self, path: str = "") -> list[str]:
        return self.folder.children(path)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.folder.read_into(path, offset, buffer)

    def create(self, path: str, size: int) -> Writer:
        return _SharedWriter(self, path, size)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        if path == self.root and self._lease is not None:
            self._lease.confirm(shared_in(path, bytes(data), where=f"{self.url}/{path}") or {})
        self.folder.put(path, data, if_absent=if_absent, if_match=if_match, durable=durable)
        if path.startswith(FOLDER) and self._lease is not None:
            self._lease.keep()

    def delete(self, path: str) -> None:
        if not path.startswith(FOLDER):
            for entry in list(self.folder.entries(f"{LINKS}{path}/")):
                self.folder.delete(entry.path)
        self.folder.delete(path)

    def child(self, path: str) -> Store:
        return self.folder.child(path)

    def sibling(self, name: str) -> Store:
        return self.folder.sibling(name)

    def flush(self, paths: Sequence[str]) -> None:
        links = self._linked()
        self.folder.flush([links[path][2] if path in links else path for path in paths])

    def tidy(self) -> None:
        self.folder.tidy()

    def overlaps(self, other: Store) -> bool:
        return self.folder.overlaps(other)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self.folder.exclusive():
            self._lease = Lease(self.pool, self.url.rpartition("/")[2])
            self._offer = self._lease.offer
            try:
                yield
            finally:
                self._lease.release()
                self._lease = None

    def close(self) -> None:
        self.folder.close()
        self.pool.close()

    def place(self, path: str, data: Buffer) -> None:
        """Keep an object: in the pool if it may lie there, else in the folder."""
        size, name = len(data), content_name(data)
        assert self._offer is not None, "nothing is written without a lease"
        if not self._offer.takes(name):
            with self.folder.create(path, size) as writer:
                writer.write_at(0, data)
            return
        if not self._offer.has(self.pool, name, size):
            put_shared(self.pool, data, name)
        self.folder.put(f"{LINKS}{path}/{name}-{size}", b"", durable=False)

    def _linked(self) -> dict[str, tuple[str, int, str]]:
        """Name, size and link of what an unfinished conversion has put into the pool, by path."""
        found = (_LINK.fullmatch(entry.path) for entry in self.folder.entries(LINKS))
        return {link["path"]: (link["name"], int(link["size"]), link[0]) for link in found if link}

    def _virtual(self) -> dict[str, Entry]:
        """What lies in the pool as if it lay here; only what may be used, and is there."""
        offer = look(self.pool) if self._offer is None else self._offer
        present = {entry.path: entry.size for entry in self.pool.entries()}
        links = {path: (name, size) for path, (name, size, _) in self._linked().items() if offer.takes(name)}
        with suppress(NotFoundError):
            links |= placed_by(self.folder.read(self.root), where=f"{self.url}/{self.root}")
        return {path: Entry(path, size, name) for path, (name, size) in links.items() if present.get(name) == size}


def sharing(destination: Store, target: Target, fingerprint: str) -> tuple[Store, Target, str]:
    """Both so that objects go into the pool beside the destination, and the fingerprint of that other plan."""
    store = SharingStore(destination, target.root)
    return store, cast("Target", cast("Any", target).sharing(store.links)), f"{fingerprint}-shared"


class _SharedWriter(Writer):
    """Puts an object together in memory; its content says what becomes of it."""

    def __init__(self, store: SharingStore, path: str, size: int) -> None:
        self._store, self._path, self._data = store, path, bytearray(size)

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._data[offset : offset + len(view)] = view

    def close(self) -> None:
        data, self._data = self._data, bytearray()
        self._store.place(self._path, data)

    def abort(self) -> None:
        self._data = bytearray()


__all__ = ["SHARED_BYTES", "SharingStore", "sharing"]
