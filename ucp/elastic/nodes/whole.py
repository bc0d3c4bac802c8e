"""Writing an object so that nobody ever sees a part of it."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from ucp.errors import NotFoundError, StorageError
from ucp.store import Buffer, Writer
from ucp.store.errors import translated


class Folder(Protocol):
    """What a writer needs of the folder that it writes to."""

    root: str
    kept_bytes: int

    def begin(self, size: int) -> tuple[str, Writer]:
        """A file without a name yet: where it lies, and what writes it."""
        ...

    def commit(self, written: str, path: str, *, if_absent: bool, if_match: str | None) -> None:
        """Give what was written its name, if the conditions hold."""
        ...

    def flush(self, paths: Sequence[str]) -> None:
        """Make objects durable."""
        ...


class WholeWriter(Writer):
    """Writes a file that has no name, in order, and gives it one when all of it is there."""

    def __init__(
        self,
        folder: Folder,
        path: str,
        size: int,
        stamp: int,
        *,
        if_absent: bool,
        if_match: str | None,
        durable: bool,
    ) -> None:
        self.folder, self.path, self.size, self.stamp, self.durable = folder, path, size, stamp, durable
        self.if_absent, self.if_match = if_absent, if_match
        self.at = 0
        self.written, self._inner = folder.begin(size)

    def write_at(self, offset: int, data: Buffer) -> None:
        length = memoryview(data).nbytes
        check_order(self.path, self.at, offset, length, self.size)
        self._inner.write_at(offset, data)
        self.at += length

    def close(self) -> None:
        try:
            check_all(self.path, self.at, self.size)
            self._inner.close()
            with translated(self.folder.root):
                os.utime(self.written, ns=(self.stamp, self.stamp))
                if self.durable:
                    _sync(self.written)
            self.folder.commit(self.written, self.path, if_absent=self.if_absent, if_match=self.if_match)
        except NotFoundError as error:
            self.abort()
            raise StorageError(f"{error.message}: removed while it was written", hint="save again") from error
        except BaseException:
            self.abort()
            raise
        self.folder.kept_bytes += self.size
        if self.durable:
            self.folder.flush([self.path])

    def abort(self) -> None:
        self._inner.abort()
        with suppress(OSError):
            os.unlink(self.written)


def check_order(path: str, at: int, offset: int, length: int, size: int) -> None:
    """StorageError unless `length` bytes from `offset` are the next ones of an object of `size` bytes."""
    if offset != at or at + length > size:
        raise StorageError(f"{path}: {length} bytes from {offset} written after byte {at} of {size}")


def check_all(path: str, at: int, size: int) -> None:
    """StorageError unless all of an object was written."""
    if at != size:
        raise StorageError(f"{path}: only {at} of {size} bytes were written")


def new_stamp() -> int:
    """A time in nanoseconds whose last digits are random: of two objects of one name no two have the same."""
    return time.time_ns() // 1_000_000 * 1_000_000 + secrets.randbelow(1_000_000)


def _sync(full: str) -> None:
    fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
