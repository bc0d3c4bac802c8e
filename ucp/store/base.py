"""The one seam to storage: a store is a folder of objects under a URL.

Paths are relative, ``/``-separated strings (never `pathlib.Path`, which would mangle URLs). Nothing relies on rename,
append or directories, so that object stores can implement it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ucp.errors import CorruptError, NotFoundError, UsageError

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Entry:
    """One object: its path, size in bytes, and a fingerprint that changes whenever the object is rewritten."""

    path: str
    size: int
    fingerprint: str


def inside(folder: str, other: str) -> bool:
    """Whether `folder` is `other` or lies in it, by their names."""
    return f"{folder.rstrip('/')}/".startswith(f"{other.rstrip('/')}/")


class Writer(ABC):
    """An object being written. Use as a context manager: an exception inside discards or leaves it invalid."""

    @abstractmethod
    def write_at(self, offset: int, data: Buffer) -> None:
        """Write `data` at byte `offset`; callers write each byte once and in order of offset."""

    @abstractmethod
    def close(self) -> None:
        """Make the object readable; StorageError if that fails. `Store.flush` makes it durable."""

    @abstractmethod
    def abort(self) -> None:
        """Give the object up; never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Store(ABC):
    """A folder of objects. Instances are cheap, picklable and safe to use from several threads.

    `url` is for people and records: it says where, but no password.

    `parallel` is how many requests at once pay. `conditional` says that the conditions of `put` are atomic: of many
    writers one wins. `locks` says that `exclusive` keeps others out. `lists` says that objects can be listed.
    """

    url: str
    parallel: int = 1
    conditional: bool = True
    locks: bool = False
    lists: bool = True

    @abstractmethod
    def entry(self, path: str) -> Entry:
        """Size and fingerprint of an object; NotFoundError if there is none."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose path starts with `prefix`, sorted by path; nothing if there are none."""

    @abstractmethod
    def children(self, path: str = "") -> list[str]:
        """Names directly under folder `path`, sorted; folders end in ``/``. Empty if there is no such folder."""

    @abstractmethod
    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from byte `offset`; CorruptError if the object ends before, NotFoundError if it is missing."""

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        """Fill `buffer` with `length` bytes from each of `offsets`, one after the other; errors as `read_into`."""
        for number, offset in enumerate(offsets):
            self.read_into(path, offset, buffer[number * length : (number + 1) * length])

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill the buffer of each (offset, buffer) of `ranges`; errors as `read_into`.

        Where requests cost more than bytes, neighbours are read together and what lies between them is thrown away.
        """
        for offset, buffer in ranges:
            self.read_into(path, offset, buffer)

    @abstractmethod
    def create(self, path: str, size: int) -> Writer:
        """Start writing an object of `size` bytes, replacing any there."""

    def replace(self, path: str, size: int) -> Writer:
        """The same, but what is there stays whole until the writer is closed; then all of the new object is there."""
        return self.create(path, size)

    @abstractmethod
    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        """Write a small object atomically.

        ConflictError with `if_absent` if it already exists, and with `if_match` if what is there has not that
        fingerprint (`Entry`) or is gone. Where the store `locks`, `if_match` is atomic among holders of `exclusive`.
        It survives a power cut when this returns, or, if not `durable`, after the next `flush` of it.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete an object; nothing happens if it is missing."""

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, or all the rest."""
        if length is None:
            length = self.entry(path).size - offset
        try:
            buffer = bytearray(length)
        except (MemoryError, OverflowError, ValueError) as error:  # a server can say what it likes of sizes
            raise CorruptError(
                f"{self.url}/{path}: there is no room for {length} bytes from byte {offset} on",
                hint="the object is not what it should be, or this machine is too small for it",
            ) from error
        self.read_into(path, offset, buffer)
        return bytes(buffer)

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path`."""
        try:
            self.entry(path)
        except NotFoundError:
            return False
        return True

    @abstractmethod
    def child(self, path: str) -> Store:
        """The store of a folder inside this one."""

    def sibling(self, name: str) -> Store:
        """The store of the folder `name` beside this one; UsageError where there is none."""
        raise UsageError(f"{self.url}: has no folder beside it, and {name!r} is to be one")

    def flush(self, paths: Sequence[str]) -> None:  # noqa: B027 - in most stores a closed object is durable
        """Make closed objects durable; StorageError if that fails."""

    def tidy(self) -> None:  # noqa: B027 - most stores leave nothing behind
        """Remove what puts and deletions that were cut short left behind; nobody else may be writing."""

    def overlaps(self, other: Store) -> bool:
        """Whether one of the two folders is the other or lies in it."""
        return inside(self.url, other.url) or inside(other.url, self.url)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other writers that ask the same out while inside, where the store can; ConflictError if one is there."""
        yield

    def close(self) -> None:  # noqa: B027 - most stores have nothing to close
        """Release open handles; the store opens them again when used."""
