"""A store of bytes in memory that counts what is read of it and refuses to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.store import Buffer, Entry, Store, Writer


class ViolationError(AssertionError):
    """A reader did what no input may make it do."""


@dataclass(slots=True)
class Meter:
    """Bytes read so far, of `most`."""

    most: int
    read: int = 0

    def count(self, size: int) -> None:
        self.read += size
        if self.read > self.most:
            raise ViolationError(f"reads {self.read} bytes of a folder for which {self.most} should do")


class FuzzStore(Store):
    """The files of `files` below `prefix`. Paths are as strict as those of `LocalStore`."""

    def __init__(self, files: Mapping[str, bytes], meter: Meter, prefix: str = "") -> None:
        self.files = files
        self.meter = meter
        self.prefix = prefix
        self.url = f"fuzz://folder/{prefix}".rstrip("/")

    def entry(self, path: str) -> Entry:
        return Entry(path, len(self._data(path)), "0")

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        start = self._full(prefix)
        for full in sorted(self.files):
            if full.startswith(start):
                yield Entry(full.removeprefix(self.prefix), len(self.files[full]), "0")

    def children(self, path: str = "") -> list[str]:
        folder = self._full(path.rstrip("/"))
        folder = f"{folder.rstrip('/')}/" if folder else ""
        parts = [full[len(folder) :].partition("/") for full in self.files if full.startswith(folder)]
        return sorted({name + slash for name, slash, _ in parts})

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        self.meter.count(len(view))
        data = self._data(path)[offset : offset + len(view)]
        if len(data) != len(view):
            raise CorruptError(f"{self.url}/{path}: ends early", hint="the file is truncated")
        view[:] = data

    def child(self, path: str) -> Store:
        return FuzzStore(self.files, self.meter, f"{self._full(path.rstrip('/'))}/")

    def create(self, path: str, size: int) -> Writer:
        raise ViolationError(f"writes {path}")

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        raise ViolationError(f"writes {path}")

    def delete(self, path: str) -> None:
        raise ViolationError(f"deletes {path}")

    def _full(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.url}")
        return self.prefix + path

    def _data(self, path: str) -> bytes:
        data = self.files.get(self._full(path))
        if data is None:
            raise NotFoundError(f"{self.url}/{path}: no such object")
        return data
