"""Writing local files: in place at positions, or beside and then all at once under their name; power cuts survived."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ucp.store.base import Buffer, Writer
from ucp.store.errors import exists_already, translated
from ucp.store.traffic import TRAFFIC

_PIECE_BYTES = 128 << 10
"""Most bytes per write call. Larger calls make the page cache look for huge folios; where memory is ballooned or
fragmented, 4 MiB calls were measured three to ten times slower than these (bench/limits.py)."""

_TRIES, _PAUSE = 100, 1e-4

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""How file systems say that they lack an operation."""

TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")
"""How what is written beside an object is called."""


class FileWriter(Writer):
    """Writes in place: what makes a checkpoint complete is its root object, which is put last."""

    def __init__(self, full: str, size: int) -> None:
        self.full = full
        self.fd = _create(full)
        try:
            _reserve(self.fd, size)
        except OSError:
            self.abort()
            raise

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with translated(self.full, "part"):
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done : done + _PIECE_BYTES], offset + done)
            TRAFFIC.request("file", "part", 0, done)

    def close(self) -> None:
        with translated(self.full):
            fd, self.fd = self.fd, -1
            os.close(fd)

    def abort(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class BesideWriter(FileWriter):
    """Writes beside the object, which it replaces when it is closed."""

    def __init__(self, full: str, size: int, forget: Callable[[], object]) -> None:
        self.final, self._forget = full, forget
        super().__init__(_temporary(full), size)

    def close(self) -> None:
        with translated(self.full):
            os.fsync(self.fd)
        super().close()
        with translated(self.final):
            os.replace(self.full, self.final)
            sync(os.path.dirname(self.final))
        self._forget()

    def abort(self) -> None:
        super().abort()
        with suppress(OSError):
            os.unlink(self.full)


def _reserve(fd: int, size: int) -> None:
    """Take the room of a file at once, where its file system can, so that a full disk shows before the work."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def put_file(full: str, data: Buffer, *, if_absent: bool, durable: bool) -> None:
    """Write beside, sync, then link or rename: readers see all of it or none."""
    temporary = _temporary(full)
    fd = _create(temporary)
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
        sync(os.path.dirname(full))


def _create(full: str) -> int:
    """Open a file to write it anew, in a folder that is made; others may remove that while it is empty."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    for tries in range(_TRIES):
        with suppress(FileNotFoundError):
            os.makedirs(os.path.dirname(full), exist_ok=True)
            return os.open(full, flags, 0o666)
        time.sleep(random.random() * tries * _PAUSE)  # two that do it in step would do so for long
    return os.open(full, flags, 0o666)


def _temporary(full: str) -> str:
    """A name beside `full` that no other thread or process writes at."""
    return f"{full}.{os.getpid()}-{threading.get_ident()}.tmp"


def _link(temporary: str, full: str) -> None:
    try:
        os.link(temporary, full)
    except FileExistsError:
        raise exists_already(full) from None


def sync(full: str) -> None:
    """Make the contents of a file, or the names in a folder, survive a power cut."""
    fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not os.path.isdir(full):
            raise  # a file must be synced; some network file systems cannot sync folders
    finally:
        os.close(fd)


def sync_file_system(fd: int) -> bool:
    """Sync the file system of an open folder in one call, which beats one per file; False where there is none."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        return False
    if syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return True
