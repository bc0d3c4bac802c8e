"""Local files: positioned reads and writes that release the GIL, and durable atomic puts."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

from ucp.errors import ConflictError, CorruptError, NotFoundError, UsageError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.errors import replaced_meanwhile, translated
from ucp.store.local_write import TEMPORARY, UNSUPPORTED, BesideWriter, FileWriter, put_file, sync, sync_file_system
from ucp.store.traffic import TRAFFIC

_OPEN_FILES = 64
_MOST_THREADS = 16
"""More do not help a disk."""
_FEW_FILES = 8
"""From more files on, one sync of the file system is cheaper than one per file (a journal commit each on ext4)."""


class LocalStore(Store):
    """A folder on a local or mounted file system. Keeps a few files open for reading."""

    locks = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self.parallel = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._files: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._held = -1

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return (LocalStore, (self.root,))

    def entry(self, path: str) -> Entry:
        full = self._full(path)
        with translated(full, "head"):
            info = os.stat(full)
            if not stat.S_ISREG(info.st_mode):
                raise FileNotFoundError(full)
        TRAFFIC.request("file", "head")
        return _entry(path, info)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        top = self._full(prefix.rpartition("/")[0])
        found: list[Entry] = []
        with translated(top, "list"):
            for folder, names in _folders(top):
                for name in names:
                    full = os.path.join(folder, name)
                    path = os.path.relpath(full, self.root).replace(os.sep, "/")
                    if path.startswith(prefix) and (info := _file(full)) is not None:
                        found.append(_entry(path, info))
        TRAFFIC.request("file", "list")
        yield from sorted(found, key=lambda entry: entry.path)

    def children(self, path: str = "") -> list[str]:
        full = self._full(path)
        if not os.path.isdir(full):
            return []
        TRAFFIC.request("file", "list")
        with translated(full, "list"), os.scandir(full) as entries:
            return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in entries)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        full = self._full(path)
        with translated(full, "get"), self._open(full) as handle:
            view = memoryview(buffer).cast("B")
            done = 0
            while done < len(view):
                count = os.preadv(handle.fd, [view[done:]], offset + done)
                if count == 0:
                    end = offset + done
                    raise CorruptError(
                        f"{full}: ends at byte {end}, {len(view) - done} bytes early", hint="the file is truncated"
                    )
                done += count
            TRAFFIC.request("file", "get", done)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None:
            return super().read(path, offset, length)
        full = self._full(path)
        with translated(full, "get"), open(full, "rb", opener=open_file) as file:
            # One file, whatever takes its name meanwhile.
            file.seek(offset)
            data = file.read()
        TRAFFIC.request("file", "get", len(data))
        return data

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        full = self._full(path)
        with translated(full, "get"), self._open(full) as handle:
            preadv, fd, at = os.preadv, handle.fd, 0
            for offset in offsets:
                if preadv(fd, [buffer[at : at + length]], offset) != length:
                    self.read_into(path, offset, buffer[at : at + length])
                at += length
        TRAFFIC.request("file", "get", at)

    def create(self, path: str, size: int) -> Writer:
        full = self._forget(path)
        with translated(full):
            return FileWriter(full, size)

    def replace(self, path: str, size: int) -> Writer:
        full = self._forget(path)
        with translated(full):
            return BesideWriter(full, size, lambda: self._forget(path))

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        full = self._forget(path)
        if if_match is not None:
            self._check_same(path, if_match)
        with translated(full, "put"):
            put_file(full, data, if_absent=if_absent, durable=durable)
            TRAFFIC.request("file", "put", 0, len(memoryview(data).cast("B")))

    def _check_same(self, path: str, fingerprint: str) -> None:
        try:
            same = self.entry(path).fingerprint == fingerprint
        except NotFoundError:
            same = False
        if not same:
            raise replaced_meanwhile(self._full(path))

    def flush(self, paths: Sequence[str]) -> None:
        TRAFFIC.request("file", "flush")
        with translated(self.root, "flush"):
            if len(paths) > _FEW_FILES and self._held >= 0 and sync_file_system(self._held):
                return
            for full in sorted({name for path in paths for name in self._and_folders(path)}):
                sync(full)

    def _and_folders(self, path: str) -> Iterator[str]:
        """The file at `path` and the folders that lead to it from the root."""
        while path:
            yield self._full(path)
            path = path.rpartition("/")[0]
        yield self.root

    def delete(self, path: str) -> None:
        full = self._forget(path)
        with translated(full, "delete"):
            with suppress(FileNotFoundError):
                os.unlink(full)
            self._prune(os.path.dirname(full))
        TRAFFIC.request("file", "delete")

    def _prune(self, folder: str) -> None:
        """Remove `folder`, and those around it inside the root, that are empty: an object store has no folders."""
        with suppress(OSError):
            while folder.startswith(self.root + os.sep):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def tidy(self) -> None:
        for entry in list(self.entries()):
            if TEMPORARY.search(entry.path):
                self.delete(entry.path)
        for folder, _, _ in os.walk(self.root, topdown=False):
            self._prune(folder)

    def overlaps(self, other: Store) -> bool:
        if not isinstance(other, LocalStore):
            return False
        a, b = (os.path.realpath(store.root) for store in (self, other))
        return _within(a, b) or _within(b, a)

    def child(self, path: str) -> LocalStore:
        return LocalStore(self._full(path))

    def sibling(self, name: str) -> LocalStore:
        return LocalStore(os.path.dirname(self.root)).child(name)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with translated(self.root):
            try:
                os.makedirs(self.root, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UsageError(f"{self.root}: a file is in the way", hint="choose another destination") from None
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with translated(self.root):
                _lock(fd, self.root)
            # Open since before the first write, so that no failed writeback can go unseen (syncfs(2), "ERRORS").
            self._held = fd
            yield
        finally:
            self._held = -1
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _forget(self, path: str) -> str:
        """The full path of an object about to change; a handle of the old one is let go."""
        full = self._full(path)
        with self._lock:
            self._files.pop(full, None)
        return full

    def _full(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.root}")
        return os.path.join(self.root, path) if path else self.root

    def _open(self, full: str) -> _Handle:
        with self._lock:
            handle = self._files.get(full)
            if handle is None or not handle.is_of(full):
                handle = self._files[full] = _Handle(full)
            self._files.move_to_end(full)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return handle


def open_file(full: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the file at `full`; CorruptError for what is no file: a pipe would have to be waited for."""
    fd = os.open(full, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        if os.path.isdir(full):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), full)
        raise CorruptError(f"{full}: no file", hint="a pipe, a socket or a device lies where a file should")
    return fd


class _Handle:
    """A file open for reading, closed when the last user lets go of it."""

    def __init__(self, full: str) -> None:
        self.fd = -1
        self.fd = open_file(full)
        self.identity = _identity(os.fstat(self.fd))

    def is_of(self, full: str) -> bool:
        """Whether the file is still the one at `full`, which another process may have replaced."""
        return _identity(os.stat(full)) == self.identity

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _within(folder: str, other: str) -> bool:
    """Whether `folder` is `other` or lies in it, by name or by what the system says of the folders that lead to it.

    Names do not tell where a file system ignores case, or shows one folder in two places.
    """
    if inside(folder, other):
        return True
    parents = [folder]
    while (parent := os.path.dirname(parents[-1])) != parents[-1]:
        parents.append(parent)
    return any(_same(parent, other) for parent in parents)


def _same(a: str, b: str) -> bool:
    try:
        return os.path.samestat(os.stat(a), os.stat(b))
    except OSError:
        return False


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `top`, those behind links too but each only once, with the names of what else is in it."""
    seen: set[str] = set()
    for folder, below, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield folder, names


def _lock(fd: int, root: str) -> None:
    """Lock a folder, where its file system can: Lustre, for one, is often mounted without (mount option ``flock``)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConflictError(f"{root}: another process is writing it", hint="wait for it to end") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _file(full: str) -> os.stat_result | None:
    """What the system says of the file at `full`; None where it says of none, or of none any more."""
    with suppress(OSError):
        info = os.stat(full)
        return info if stat.S_ISREG(info.st_mode) else None
    return None


def _entry(path: str, info: os.stat_result) -> Entry:
    """The time of the last change (ctime) is in the fingerprint because, unlike mtime, nobody can set it back."""
    return Entry(path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}-{info.st_ctime_ns}-{info.st_ino}")
