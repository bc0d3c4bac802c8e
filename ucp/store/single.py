"""One object seen as a folder that holds nothing else: what the URL of a file is opened as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ucp.errors import NotFoundError, UsageError
from ucp.store.base import Buffer, Entry, Store, Writer


class SingleStore(Store):
    """The object `name` of `folder`, and nothing beside it; read only.

    `url` is that of the folder, so that ``url/name`` is where the object lies.
    """

    def __init__(self, folder: Store, name: str) -> None:
        self.folder = folder
        self.name = name
        self.url = folder.url
        self.parallel, self.lists = folder.parallel, folder.lists

    @property
    def address(self) -> str:
        """URL of the object itself."""
        return f"{self.url}/{self.name}"

    def entry(self, path: str) -> Entry:
        return self.folder.entry(self._own(path))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        if self.name.startswith(prefix):
            yield self.folder.entry(self.name)

    def children(self, path: str = "") -> list[str]:
        return [] if path else [self.name]

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.folder.read_into(self._own(path), offset, buffer)

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        self.folder.read_runs(self._own(path), offsets, length, buffer)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self.folder.read_ranges(self._own(path), ranges)

    def create(self, path: str, size: int) -> Writer:
        raise self._read_only()

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        raise self._read_only()

    def delete(self, path: str) -> None:
        raise self._read_only()

    def child(self, path: str) -> Store:
        return self.folder.child(f"{self.name}/{path}")

    def overlaps(self, other: Store) -> bool:
        """Whether the object lies in the other folder."""
        return self.folder.child(self.name).overlaps(other)

    def close(self) -> None:
        self.folder.close()

    def _own(self, path: str) -> str:
        if path != self.name:
            raise NotFoundError(f"{self.url}/{path}: only {self.name} was opened", hint="open the folder it lies in")
        return path

    def _read_only(self) -> UsageError:
        return UsageError(f"{self.address}: a file and no folder", hint="choose another destination")


__all__ = ["SingleStore"]
