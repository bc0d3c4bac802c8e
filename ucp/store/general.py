"""Any protocol that fsspec knows: the general door, one object at a time, written in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import fsspec

from ucp.errors import ConflictError, CorruptError, StorageError, UsageError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.errors import translated, without_secrets


class FsspecStore(Store):
    """A folder on any fsspec file system. `options` go to the file system as they are.

    `url` is the address without credentials, so that no message, record or document gives them away.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self._address = url.rstrip("/")
        self.url = without_secrets(self._address)
        self.options = options or {}
        with translated(self.url):
            try:
                self.fs, self.root = fsspec.core.url_to_fs(self._address, **self.options)
            except (ValueError, ImportError) as error:
                raise UsageError(f"{self.url}: {error}", hint="install the fsspec package of this protocol") from error
        self.root = self.root.rstrip("/")
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FsspecStore], tuple[str, dict[str, Any]]]:
        return (FsspecStore, (self._address, self.options))

    def entry(self, path: str) -> Entry:
        full = self._full(path)
        with translated(self._name(path)):
            info = self.fs.info(full)
            if info["type"] != "file":
                raise FileNotFoundError(full)
        return _entry(path, info)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        top = self._full(prefix.rpartition("/")[0])
        with translated(self._name(prefix)):
            try:
                found = self.fs.find(top, detail=True)
            except FileNotFoundError:
                found = {}
        skip = len(self.root) + 1
        entries = [_entry(full[skip:], info) for full, info in found.items() if full[skip:].startswith(prefix)]
        yield from sorted(entries, key=lambda entry: entry.path)

    def children(self, path: str = "") -> list[str]:
        full = self._full(path)
        with translated(self._name(path)):
            try:
                found = self.fs.ls(full, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = ((info["name"].rstrip("/").rpartition("/")[2], info["type"]) for info in found)
        return sorted(name + ("/" if kind == "directory" else "") for name, kind in names)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        name = self._name(path)
        with translated(name):
            data = self.fs.cat_file(self._full(path), start=offset, end=offset + len(view)) if len(view) else b""
        if len(data) != len(view):
            end = offset + len(data)
            raise CorruptError(
                f"{name}: ends at byte {end}, {len(view) - len(data)} bytes early", hint="the object is truncated"
            )
        view[:] = data

    def create(self, path: str, size: int) -> Writer:
        full = self._full(path)
        with translated(self._name(path)):
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            return _FsspecWriter(self._name(path), self.fs.open(full, "wb"))

    def put(self, path: str, data: Buffer, *, if_absent: bool = False, durable: bool = True) -> None:
        full = self._full(path)
        with translated(self._name(path)), self._lock:
            if if_absent and self.fs.exists(full):
                raise ConflictError(f"{self._name(path)}: already exists", hint="choose another destination")
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(full, bytes(data))

    def delete(self, path: str) -> None:
        full = self._full(path)
        with translated(self._name(path)):
            if self.fs.exists(full):
                self.fs.rm_file(full)

    def child(self, path: str) -> FsspecStore:
        self._full(path)
        return FsspecStore(f"{self._address}/{path}" if path else self._address, self.options)

    def overlaps(self, other: Store) -> bool:
        if not isinstance(other, FsspecStore):
            return False
        return inside(self._address, other._address) or inside(other._address, self._address)

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _full(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.url}")
        return f"{self.root}/{path}" if path else self.root


class _FsspecWriter(Writer):
    """Streams to an fsspec file, which becomes visible when it is closed."""

    def __init__(self, name: str, file: Any) -> None:
        self.name = name
        self.file = file
        self.position = 0

    def write_at(self, offset: int, data: Buffer) -> None:
        if offset != self.position:
            raise StorageError(f"{self.name}: byte {offset} written after byte {self.position}")
        with translated(self.name):
            self.file.write(data)
        self.position += len(memoryview(data).cast("B"))

    def close(self) -> None:
        with translated(self.name):
            self.file.close()

    def abort(self) -> None:
        try:
            self.file.discard() if hasattr(self.file, "discard") else None
        except (OSError, NotImplementedError):
            return


def _text(mark: object) -> str:
    """The same text whether a file system tells a time as a number, as `ls` may, or as a datetime, as `info` may."""
    return str(mark.timestamp() if isinstance(mark, datetime) else mark)


def _entry(path: str, info: dict[str, Any]) -> Entry:
    marks = (info.get(name) for name in ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created"))
    mark = next((_text(value) for value in marks if value is not None), "")
    return Entry(path, int(info["size"]), f"{info['size']}-{mark}")
