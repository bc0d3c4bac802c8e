"""The folder of one node, in memory or on its disk: objects appear in it under their names only whole."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import IO
from urllib.parse import quote

from ucp.elastic.nodes.member import Member
from ucp.elastic.nodes.room import room_of
from ucp.elastic.nodes.whole import WholeWriter, new_stamp
from ucp.elastic.private import private_folder
from ucp.errors import NotFoundError, StorageError, UsageError
from ucp.store import Entry, LocalStore, Writer
from ucp.store.errors import exists_already, replaced_meanwhile, translated
from ucp.store.local import open_file

PARTIAL = ".ucp-partial"
"""The folder of what is being written. A name is given to an object when all of it is there."""

_LONGEST = 255
"""Most bytes of a file's name."""

_TRIES = 100
_ASKED_BYTES = 1 << 20
"""From this size on it is looked whether there is room, before any memory is taken."""


def node_name() -> str:
    """The name of this node: ``UCP_NODE``, or the name of the host."""
    return os.environ.get("UCP_NODE") or socket.gethostname()


def folder_of(root: str, job: str, node: str) -> str:
    """``<root>/ucp-<uid>/<job>/<node>``, made for this user alone; what names cannot have in a path is escaped.

    UnsafeError as from `private_folder`: in a place such as ``/dev/shm`` everybody can make folders.
    """
    return private_folder(root, f"ucp-{os.geteuid()}", _name(job), _name(node))


def _name(name: str) -> str:
    found = quote(name, safe="")
    if found in ("", ".", "..") or len(found) > _LONGEST:
        raise UsageError(f"{name!r} is no name of a job or a node", hint=f"1 to {_LONGEST} letters, digits, _, - and .")
    return found


class NodeFolder(Member, LocalStore):
    """A local folder in which nobody ever sees half an object, and whose fingerprints are the same on every node.

    Who writes an object gives it a `stamp`, in nanoseconds, which becomes its time of change; size and stamp are its
    fingerprint. `kept_bytes` counts what this instance has written.
    """

    def __init__(self, root: str, path: str = "") -> None:
        self.top, self.path = os.path.abspath(root), path
        super().__init__(os.path.join(self.top, path) if path else self.top)
        self._partial = LocalStore(os.path.join(self.top, PARTIAL))
        self.kept_bytes = 0

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str, str]]:  # type: ignore[override]
        return (NodeFolder, (self.top, self.path))

    def entry(self, path: str) -> Entry:
        full = self._full(path)
        with translated(full):
            info = os.lstat(full)
        if not stat.S_ISREG(info.st_mode):
            raise NotFoundError(f"{full}: not an object")
        return _entry(path, info)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        self._full(prefix)
        top = self._full(prefix.rpartition("/")[0])
        found = []
        for folder, below, names in os.walk(top):
            if folder == self.top and PARTIAL in below:
                below.remove(PARTIAL)
            for name in names:
                full = os.path.join(folder, name)
                path = os.path.relpath(full, self.root)
                if path.startswith(prefix):
                    with suppress(FileNotFoundError):  # gone since the folder was read
                        info = os.lstat(full)
                        found += [_entry(path, info)] if stat.S_ISREG(info.st_mode) else []
        yield from sorted(found, key=lambda entry: entry.path)

    def children(self, path: str = "") -> list[str]:
        try:
            found = super().children(path)
        except NotFoundError:  # gone since it was looked for
            return []
        return [name for name in found if path or self.path or name != f"{PARTIAL}/"]

    def create(
        self,
        path: str,
        size: int,
        *,
        stamp: int | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
        durable: bool = False,
    ) -> Writer:
        self._full(path)
        self.make_folder(self._partial.root)
        if size >= _ASKED_BYTES and size > self.room():
            raise StorageError(
                f"{self.root}: there is no room for {size} bytes of {path}", hint="free memory, or keep fewer copies"
            )
        return WholeWriter(
            self, path, size, stamp or new_stamp(), if_absent=if_absent, if_match=if_match, durable=durable
        )

    def delete(self, path: str) -> None:
        with suppress(NotFoundError):  # another one was first
            super().delete(path)

    def opened(self, path: str) -> IO[bytes]:
        """The file of an object, for reading."""
        full = self._full(path)
        with translated(full, "get"):
            return open(full, "rb", buffering=0, opener=_open_no_link)

    def clear(self, path: str) -> None:
        full = self._full(path)
        if full == self.root:
            for name in self.children():
                self.clear(name.rstrip("/")) if name.endswith("/") else self.delete(name)
            return
        if not os.path.isdir(full):
            return
        gone = os.path.join(self._partial.root, _unique())
        self.make_folder(self._partial.root)
        with translated(full), suppress(FileNotFoundError):
            os.rename(full, gone)
        shutil.rmtree(gone, ignore_errors=True)
        self._prune(os.path.dirname(full))

    def tidy(self) -> None:
        """Remove what writers that were killed have left; nobody may be writing."""
        shutil.rmtree(self._partial.root, ignore_errors=True)
        for folder, _, _ in os.walk(self.root, topdown=False):
            self._prune(folder)

    def room(self) -> int:
        return room_of(self.top)

    def child(self, path: str) -> NodeFolder:
        self._full(path)
        return NodeFolder(self.top, _joined(self.path, path))

    def sibling(self, name: str) -> LocalStore:
        return self.child("") if not self.path else NodeFolder(self.top, _joined(self.path.rpartition("/")[0], name))

    def _full(self, path: str) -> str:
        full = super()._full(path)
        if _joined(self.path, path).partition("/")[0] == PARTIAL:
            raise UsageError(f"{path!r} is not a path inside {self.root}")
        return full

    def begin(self, size: int) -> tuple[str, Writer]:
        """A file without a name yet, of `size` bytes: where it lies, and what writes it."""
        name = _unique()
        full = os.path.join(self._partial.root, name)
        try:
            return full, self._partial.create(name, size)
        except StorageError:
            with suppress(OSError):  # made, but there was no room for its bytes
                os.unlink(full)
            raise

    def commit(self, written: str, path: str, *, if_absent: bool, if_match: str | None) -> None:
        """Give what was written at `written` its name; ConflictError if a condition does not hold."""
        full = self._forget(path)
        with translated(full), self._turn() if if_absent or if_match is not None else nullcontext():
            if if_match is not None and not self._matches(path, if_match):
                raise replaced_meanwhile(full)
            for _ in range(_TRIES):
                self.make_folder(os.path.dirname(full))
                try:
                    _named(written, full, if_absent=if_absent)
                except FileNotFoundError:  # whoever deleted the last object of the folder took that along
                    if not os.path.lexists(written):
                        raise
                else:
                    return
        raise StorageError(f"{full}: its folder is removed again and again")

    def make_folder(self, folder: str) -> None:
        """Make a folder below the top, for this user alone.

        Never the top itself: in a place such as ``/dev/shm`` another user may have been quicker (`folder_of`).
        """
        if os.path.isdir(folder):
            return
        if folder == self.top:
            raise StorageError(
                f"{self.top}: the folder of this node was removed",
                hint="the next start of the job makes it again; systemd-logind does this at logout (RemoveIPC=)",
            )
        self.make_folder(os.path.dirname(folder))
        with translated(folder), suppress(FileExistsError):
            os.mkdir(folder, 0o700)

    def _matches(self, path: str, fingerprint: str) -> bool:
        try:
            return self.entry(path).fingerprint == fingerprint
        except NotFoundError:
            return False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Of those that put under conditions, one at a time, of all processes of this node."""
        # Not the folder of objects, whose lock is that of `exclusive`.
        fd = os.open(self._partial.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _unique() -> str:
    return f"{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(8)}"


def _open_no_link(full: str, flags: int) -> int:
    return open_file(full, flags | os.O_NOFOLLOW)


def _joined(path: str, more: str) -> str:
    return f"{path}/{more}" if path and more else path or more


def _entry(path: str, info: os.stat_result) -> Entry:
    return Entry(path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}")


def _named(written: str, full: str, *, if_absent: bool) -> None:
    if not if_absent:
        os.replace(written, full)
        return
    try:
        os.link(written, full)
    except FileExistsError:
        raise exists_already(full) from None
    os.unlink(written)
