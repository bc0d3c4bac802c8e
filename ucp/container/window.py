"""Reads of one object through a few kept ranges, so that many small looks cost few requests."""

from __future__ import annotations

from ucp.errors import CorruptError
from ucp.store import Store

_WHOLE = 1 << 20
_TAIL = 1 << 16


class Window:
    """An object of `size` bytes at `path`: read whole if it is small, else its tail, and what is asked for.

    `where` names the object in errors.
    """

    def __init__(self, store: Store, path: str, size: int) -> None:
        self.where = f"{store.url}/{path}"
        self.size = size
        self._store = store
        self._path = path
        self._kept: list[tuple[int, bytes]] = []
        self.keep(0 if size <= _WHOLE else size - _TAIL, size)

    def keep(self, start: int, stop: int) -> None:
        """Read bytes [start, stop) and keep them."""
        if stop > start:
            self._kept.append((start, self._store.read(self._path, start, stop - start)))

    def has(self, offset: int) -> bool:
        """Whether byte `offset` is at hand without a request."""
        return any(start <= offset < start + len(data) for start, data in self._kept)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; CorruptError if the object does not have them."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptError(
                f"{self.where}: ends at byte {self.size}, before the {length} bytes that should be at {offset}",
                hint="the file is truncated or damaged: get it again from where it was written",
            )
        for start, data in self._kept:
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return self._store.read(self._path, offset, length)
