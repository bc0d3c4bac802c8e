"""Any protocol that fsspec knows: the general door, one object at a time, written in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

import fsspec

from ucp.errors import CorruptError, StorageError, UsageError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.errors import exists_already, replaced_meanwhile, scheme_of, translated, without_secrets
from ucp.store.traffic import TRAFFIC

_WRITING = threading.Lock()


class FsspecStore(Store):
    """A folder on any fsspec file system. `options` go to the file system as they are.

    fsspec has no conditional writes: the conditions of `put` hold within one process, and elsewhere by good fortune.

    `url` is the address without credentials, so that no message, record or document gives them away.
    """

    parallel = 8
    conditional = False

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
        self.scheme = scheme_of(self.url)

    def __reduce__(self) -> tuple[type[FsspecStore], tuple[str, dict[str, Any]]]:
        return (FsspecStore, (self._address, self.options))

    def entry(self, path: str) -> Entry:
        full = self._full(path)
        with translated(self._name(path), "head"):
            info = self.fs.info(full)
            if info["type"] != "file":
                raise FileNotFoundError(full)
        TRAFFIC.request(self.scheme, "head")
        return _entry(path, info)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        top = self._full(prefix.rpartition("/")[0])
        with translated(self._name(prefix), "list"):
            try:
                found = self.fs.find(top, detail=True)
            except FileNotFoundError:
                found = {}
        TRAFFIC.request(self.scheme, "list")
        skip = len(self.root) + 1
        entries = [_entry(full[skip:], info) for full, info in found.items() if full[skip:].startswith(prefix)]
        yield from sorted(entries, key=lambda entry: entry.path)

    def children(self, path: str = "") -> list[str]:
        full = self._full(path)
        with translated(self._name(path), "list"):
            TRAFFIC.request(self.scheme, "list")
            try:
                found = self.fs.ls(full, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Asked for what is in a file, a file system lists the file.
        below = (info for info in found if info["name"].rstrip("/") != full)
        names = ((info["name"].rstrip("/").rpartition("/")[2], info["type"]) for info in below)
        return sorted(name + ("/" if kind == "directory" else "") for name, kind in names)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        name = self._name(path)
        with translated(name, "get"):
            data = self.fs.cat_file(self._full(path), start=offset, end=offset + len(view)) if len(view) else b""
        TRAFFIC.request(self.scheme, "get", len(data))
        if len(data) != len(view):
            end = offset + len(data)
            raise CorruptError(
                f"{name}: ends at byte {end}, {len(view) - len(data)} bytes early", hint="the object is truncated"
            )
        view[:] = data

    def _check_writable(self) -> None:
        """What a chain of protocols ends in has another URL too, by which nobody would know it again as a source."""
        if "::" in self._address:
            raise UsageError(f"{self.url}: a chained URL can only be read", hint="name the place itself")

    def create(self, path: str, size: int) -> Writer:
        self._check_writable()
        full = self._full(path)
        with translated(self._name(path)):
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            return _FsspecWriter(self._name(path), self.fs.open(full, "wb"))

    def replace(self, path: str, size: int) -> Writer:
        self._check_writable()
        full = self._full(path)
        with translated(self._name(path)):
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            return _Replacement(self._name(path), self.fs, full)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        self._check_writable()
        full = self._full(path)
        with translated(self._name(path), "put"), _WRITING:
            if if_absent and self.fs.exists(full):
                raise exists_already(self._name(path))
            if if_match is not None and not (self.fs.exists(full) and self.entry(path).fingerprint == if_match):
                raise replaced_meanwhile(self._name(path))
            self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(full, bytes(data))
        TRAFFIC.request(self.scheme, "put", 0, len(memoryview(data).cast("B")))

    def delete(self, path: str) -> None:
        self._check_writable()
        full = self._full(path)
        with translated(self._name(path), "delete"):
            if self.fs.exists(full):
                self.fs.rm_file(full)
        TRAFFIC.request(self.scheme, "delete")

    def child(self, path: str) -> FsspecStore:
        self._full(path)
        return FsspecStore(f"{self._address}/{path}" if path else self._address, self.options)

    def sibling(self, name: str) -> Store:
        top, _, last = self._address.rpartition("/")
        if not top or top.endswith(("/", ":")) or not last:
            return super().sibling(name)
        return FsspecStore(top, self.options).child(name)

    def overlaps(self, other: Store) -> bool:
        if "::" in self._address:
            from ucp.store import open_store

            return open_store(self._address.rpartition("::")[2]).overlaps(other)
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
        with translated(self.name, "part"):
            self.file.write(data)
        length = len(memoryview(data).cast("B"))
        TRAFFIC.request(scheme_of(self.name), "part", 0, length)
        self.position += length

    def close(self) -> None:
        with translated(self.name, "part"):
            self.file.close()

    def abort(self) -> None:
        try:
            self.file.discard() if hasattr(self.file, "discard") else None
        except (OSError, NotImplementedError, RuntimeError):  # a file of a disk is there at once
            return


class _Replacement(_FsspecWriter):
    """Writes beside the object, and moves what it wrote there when it is closed."""

    def __init__(self, name: str, fs: Any, full: str) -> None:
        self.fs = fs
        self.final, self.beside = full, f"{full}.{os.getpid()}-{threading.get_ident()}.tmp"
        super().__init__(name, fs.open(self.beside, "wb"))

    def close(self) -> None:
        super().close()
        with translated(self.name, "part"):
            self.fs.mv(self.beside, self.final)

    def abort(self) -> None:
        super().abort()
        with suppress(OSError):
            self.fs.rm_file(self.beside)


def _text(mark: object) -> str:
    """The same text whether a file system tells a time as a number, as `ls` may, or as a datetime, as `info` may."""
    return str(mark.timestamp() if isinstance(mark, datetime) else mark)


def _entry(path: str, info: dict[str, Any]) -> Entry:
    marks = (info.get(name) for name in ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created"))
    mark = next((_text(value) for value in marks if value is not None), "")
    return Entry(path, int(info["size"]), f"{info['size']}-{mark}")
