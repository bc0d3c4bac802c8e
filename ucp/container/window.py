"""Reads of one object through a few kept ranges, so that many small looks cost few requests."""

from __future__ import annotations

from collections.abc import Sequence

from ucp.errors import CorruptError
from ucp.store import Store

_WHOLE = 1 << 20
_TAIL = 1 << 16


class Window:
    """An object of `size` bytes at `path`: read whole if it is small, else its tail, and what is asked for.

    `where` names the object in errors. With `start` it is the part of the object from that byte on; places are counted
    from there. With `kept` nothing is read at first: these are (place, bytes) that were, which may lie beyond the part.
    """

    def __init__(
        self, store: Store, path: str, size: int, *, start: int = 0, kept: Sequence[tuple[int, bytes]] | None = None
    ) -> None:
        self.where = f"{store.url}/{path}" + (f" at byte {start}" if start else "")
        self.size = size
        self.start = start
        self._store = store
        self._path = path
        self._kept: list[tuple[int, bytes]] = list(kept or ())
        if kept is None:
            self.keep(0 if size <= _WHOLE else size - _TAIL, size)

    def keep(self, start: int, stop: int) -> None:
        """Read bytes [start, stop) and keep them."""
        if stop > start:
            self._kept.append((start, self._store.read(self._path, self.start + start, stop - start)))

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
        return self._store.read(self._path, self.start + offset, length)
