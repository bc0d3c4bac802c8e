"""Local files: positioned reads and writes that release the GIL, and durable atomic puts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

from ucp.errors import ConflictError, CorruptError, UsageError
from ucp.store.base import Buffer, Entry, Store, Writer, inside
from ucp.store.errors import translated

_OPEN_FILES = 64
_PIECE_BYTES = 128 << 10
"""Most bytes per write call. Larger calls make the page cache look for huge folios; where memory is ballooned or
fragmented, 4 MiB calls were measured three to ten times slower than these (bench/limits.py)."""
_FEW_FILES = 8
"""From more files on, one sync of the file system is cheaper than one per file (a journal commit each on ext4)."""

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""How file systems say that they lack an operation."""

_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")
"""How `_put` names what it writes beside its object."""


class LocalStore(Store):
    """A folder on a local or mounted file system. Keeps a few files open for reading."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self._files: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._held = -1

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return (LocalStore, (self.root,))

    def entry(self, path: str) -> Entry:
        full = self._full(path)
        with translated(full):
            info = os.stat(full)
            if not os.path.isfile(full):
                raise FileNotFoundError(full)
        return _entry(path, info)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        top = self._full(prefix.rpartition("/")[0])
        found: list[Entry] = []
        with translated(top):
            for folder, names in _folders(top):
                for name in names:
                    full = os.path.join(folder, name)
                    path = os.path.relpath(full, self.root).replace(os.sep, "/")
                    if path.startswith(prefix) and os.path.isfile(full):
                        found.append(_entry(path, os.stat(full)))
        yield from sorted(found, key=lambda entry: entry.path)

    def children(self, path: str = "") -> list[str]:
        full = self._full(path)
        if not os.path.isdir(full):
            return []
        with translated(full), os.scandir(full) as entries:
            return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in entries)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        full = self._full(path)
        with translated(full), self._open(full) as handle:
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

    def create(self, path: str, size: int) -> Writer:
        full = self._forget(path)
        with translated(full):
            os.makedirs(os.path.dirname(full), exist_ok=True)
            return _LocalWriter(full, size)

    def put(self, path: str, data: Buffer, *, if_absent: bool = False, durable: bool = True) -> None:
        full = self._forget(path)
        with translated(full):
            os.makedirs(os.path.dirname(full), exist_ok=True)
            _put(full, data, if_absent=if_absent, durable=durable)

    def flush(self, paths: Sequence[str]) -> None:
        with translated(self.root):
            if len(paths) > _FEW_FILES and self._held >= 0 and _sync_file_system(self._held):
                return
            for full in sorted({name for path in paths for name in self._and_folders(path)}):
                _sync(full)

    def _and_folders(self, path: str) -> Iterator[str]:
        """The file at `path` and the folders that lead to it from the root."""
        while path:
            yield self._full(path)
            path = path.rpartition("/")[0]
        yield self.root

    def delete(self, path: str) -> None:
        full = self._forget(path)
        with translated(full):
            if os.path.lexists(full):
                os.unlink(full)
            self._prune(os.path.dirname(full))

    def _prune(self, folder: str) -> None:
        """Remove `folder`, and those around it inside the root, that are empty: an object store has no folders."""
        with suppress(OSError):
            while folder.startswith(self.root + os.sep):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def tidy(self) -> None:
        for entry in list(self.entries()):
            if _TEMPORARY.search(entry.path):
                self.delete(entry.path)

    def overlaps(self, other: Store) -> bool:
        if not isinstance(other, LocalStore):
            return False
        a, b = (os.path.realpath(store.root) for store in (self, other))
        return inside(a, b) or inside(b, a)

    def child(self, path: str) -> LocalStore:
        return LocalStore(self._full(path))

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
            if handle is None:
                handle = self._files[full] = _Handle(full)
            self._files.move_to_end(full)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return handle


class _Handle:
    """A file open for reading, closed when the last user lets go of it."""

    def __init__(self, full: str) -> None:
        self.fd = -1
        self.fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _LocalWriter(Writer):
    """Writes in place: what makes a checkpoint complete is its root object, which is put last."""

    def __init__(self, full: str, size: int) -> None:
        self.full = full
        self.fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _reserve(self.fd, size)
        except OSError:
            self.abort()
            raise

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with translated(self.full):
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done : done + _PIECE_BYTES], offset + done)

    def close(self) -> None:
        with translated(self.full):
            fd, self.fd = self.fd, -1
            os.close(fd)

    def abort(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
        if error.errno not in _UNSUPPORTED:
            raise


def _reserve(fd: int, size: int) -> None:
    """Take the room of a file at once, where its file system can, so that a full disk shows before the work."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _entry(path: str, info: os.stat_result) -> Entry:
    """The time of the last change (ctime) is in the fingerprint because, unlike mtime, nobody can set it back."""
    return Entry(path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}-{info.st_ctime_ns}-{info.st_ino}")


def _put(full: str, data: Buffer, *, if_absent: bool, durable: bool) -> None:
    """Write beside, sync, then link or rename: readers see all of it or none."""
    temporary = f"{full}.{os.getpid()}-{threading.get_ident()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
        if if_absent:
            _link(temporary, full)
        else:
            os.replace(temporary, full)
    finally:
        os.close(fd)
        if os.path.lexists(temporary):
            os.unlink(temporary)
    if durable:
        _sync(os.path.dirname(full))


def _link(temporary: str, full: str) -> None:
    try:
        os.link(temporary, full)
    except FileExistsError:
        raise ConflictError(
            f"{full}: already exists", hint="another writer was first; choose another destination"
        ) from None


def _sync(full: str) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut."""
    fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not os.path.isdir(full):
            raise  # a file must be synced; some network file systems cannot sync folders
    finally:
        os.close(fd)


def _sync_file_system(fd: int) -> bool:
    """Sync the file system of an open folder in one call, which beats one per file; False where there is none."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        return False
    if syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return True
