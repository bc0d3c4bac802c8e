"""A store that counts what is read of it, and one in which putting an object fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ucp.errors import StorageError
from ucp.store import Buffer, Entry, Store, Writer


class Around(Store):
    """Everything as in the `inner` store."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.parallel, self.conditional, self.locks, self.lists = (
            inner.parallel,
            inner.conditional,
            inner.locks,
            inner.lists,
        )

    def entry(self, path: str) -> Entry:
        return self.inner.entry(path)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        return self.inner.entries(prefix)

    def children(self, path: str = "") -> list[str]:
        return self.inner.children(path)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.inner.read_into(path, offset, buffer)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self.inner.read_ranges(path, ranges)

    def create(self, path: str, size: int) -> Writer:
        return self.inner.create(path, size)

    def replace(self, path: str, size: int) -> Writer:
        return self.inner.replace(path, size)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        self.inner.put(path, data, if_absent=if_absent, if_match=if_match, durable=durable)

    def delete(self, path: str) -> None:
        self.inner.delete(path)

    def child(self, path: str) -> Store:
        return self.inner.child(path)

    def sibling(self, name: str) -> Store:
        return self.inner.sibling(name)

    def flush(self, paths: Sequence[str]) -> None:
        self.inner.flush(paths)

    def tidy(self) -> None:
        self.inner.tidy()

    def overlaps(self, other: Store) -> bool:
        return self.inner.overlaps(other)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self.inner.exclusive():
            yield

    def close(self) -> None:
        self.inner.close()


class Counted(Around):
    """Counts bytes read, those of stores of folders inside it too."""

    def __init__(self, inner: Store, top: Counted | None = None) -> None:
        super().__init__(inner)
        self._top = top or self
        self.bytes_read = 0

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self._top.bytes_read += memoryview(buffer).nbytes
        super().read_into(path, offset, buffer)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self._top.bytes_read += sum(buffer.nbytes for _, buffer in ranges)
        super().read_ranges(path, ranges)

    def child(self, path: str) -> Store:
        return Counted(self.inner.child(path), self._top)

    def sibling(self, name: str) -> Store:
        return Counted(self.inner.sibling(name), self._top)


class Refusing(Around):
    """Refuses to put the object `refused`, as a store does whose machine stops at that moment."""

    def __init__(self, inner: Store, refused: str) -> None:
        super().__init__(inner)
        self.refused = refused

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        if path == self.refused:
            raise StorageError(f"{self.url}/{path}: stopped here")
        super().put(path, data, if_absent=if_absent, if_match=if_match, durable=durable)


__all__ = ["Around", "Counted", "Refusing"]
