"""An object store in memory that does what S3 does and nothing more, for the processes that this one forks too.

Puts and closed writers are atomic; what is written becomes visible when its writer is closed. ETags are digests of the
contents, so that the same bytes put again look the same. Conditions of puts are checked and carried out as one. There
are no locks, no renames and no folders; listings tell what is there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from ucp.errors import CorruptError, NotFoundError, StorageError, UcpError, UsageError
from ucp.store import Buffer, Entry, Store, Writer
from ucp.store.errors import exists_already, replaced_meanwhile


class Bucket:
    """Objects by key, in the process that made it; its forks reach it through a socket once it is `served`."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._address = ""
        self._lines = threading.local()
        self._open, self._closed = 0, threading.Condition()

    def put(self, key: str, data: bytes, etag: str, if_absent: bool, if_match: str | None) -> None:
        with self._lock:
            there = self.objects.get(key)
            if if_absent and there is not None:
                raise exists_already(key)
            if if_match is not None and (there is None or there[1] != if_match):
                raise replaced_meanwhile(key)
            self.objects[key] = data, etag

    def head(self, key: str) -> tuple[int, str]:
        data, etag = self._get(key)
        return len(data), etag

    def get(self, key: str, offset: int, length: int) -> bytes:
        data, _ = self._get(key)
        found = data[offset : offset + length]
        if len(found) < length:
            raise CorruptError(f"{key}: ends at byte {len(data)}, {length - len(found)} bytes early")
        return found

    def whole(self, key: str, offset: int) -> bytes:
        return self._get(key)[0][offset:]

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)

    def list(self, prefix: str) -> list[tuple[str, int, str]]:
        with self._lock:
            return sorted(
                (key, len(data), etag) for key, (data, etag) in self.objects.items() if key.startswith(prefix)
            )

    def _get(self, key: str) -> tuple[bytes, str]:
        found = self.objects.get(key)
        if found is None:
            raise NotFoundError(f"{key}: no such object")
        return found

    def ask(self, name: str, *args: Any) -> Any:
        """Do `name`, here or in the process that has the objects."""
        if os.getpid() == self._process:
            return getattr(self, name)(*args)
        if getattr(self._lines, "process", None) != os.getpid():
            assert self._address, "the bucket is not served to other processes"
            self._lines.line, self._lines.process = Client(self._address, "AF_UNIX"), os.getpid()
        line: Connection = self._lines.line
        line.send((name, args))
        found = line.recv()
        if isinstance(found, UcpError):
            raise found
        return found

    def serve(self) -> Bucket:
        """Answer forks of this process from a thread."""
        listener = Listener(family="AF_UNIX", backlog=64)
        self._address = str(listener.address)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def _accept(self, listener: Listener) -> None:
        while True:
            line = listener.accept()
            with self._closed:
                self._open += 1
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: Connection) -> None:
        try:
            with line:
                while True:
                    name, args = line.recv()
                    line.send(_told(self, name, args))
        except (EOFError, OSError):  # the process is dead
            pass
        finally:
            with self._closed:
                self._open -= 1
                self._closed.notify_all()

    def settle(self) -> None:
        """Wait until all is done that processes which are dead by now had asked for."""
        if not self._address:
            return
        with Client(self._address, "AF_UNIX") as line:  # those before it were accepted before it
            line.send(("head", ("",)))
            line.recv()
            with self._closed:
                assert self._closed.wait_for(lambda: self._open <= 1, 60), "a process that uses the bucket lives"


def _told(bucket: Bucket, name: str, args: Any) -> Any:
    try:
        return getattr(bucket, name)(*args)
    except UcpError as error:
        return error


class ObjectStore(Store):
    """A folder of a `bucket`."""

    parallel = 4

    def __init__(self, bucket: Bucket, folder: str = "") -> None:
        self.bucket, self.folder = bucket, folder
        self.url = f"objects://bucket/{folder}".rstrip("/")

    def entry(self, path: str) -> Entry:
        return Entry(path, *self.bucket.ask("head", self._key(path)))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        found = self.bucket.ask("list", self._key(prefix))
        return (Entry(key[len(self.folder) :], size, etag) for key, size, etag in found)

    def children(self, path: str = "") -> list[str]:
        top = self._key(f"{path}/" if path else "")
        names = {key[len(top) :].partition("/")[:2] for key, _, _ in self.bucket.ask("list", top)}
        return sorted("".join(name) for name in names)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self.bucket.ask("get", self._key(path), offset, len(view))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None:
            return super().read(path, offset, length)
        found: bytes = self.bucket.ask("whole", self._key(path), offset)
        return found

    def create(self, path: str, size: int) -> Writer:
        return _ObjectWriter(self, self._key(path), size)

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        whole = bytes(data)
        self.bucket.ask("put", self._key(path), whole, hashlib.md5(whole).hexdigest(), if_absent, if_match)

    def delete(self, path: str) -> None:
        self.bucket.ask("delete", self._key(path))

    def child(self, path: str) -> Store:
        return ObjectStore(self.bucket, self._key(f"{path}/" if path else ""))

    def sibling(self, name: str) -> Store:
        above = self.folder.rstrip("/").rpartition("/")[0]
        return ObjectStore(self.bucket, f"{above}/{name}/" if above else f"{name}/")

    def _key(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"{path!r} is not a path inside {self.url}")
        return f"{self.folder}{path}"


class _ObjectWriter(Writer):
    """A multipart upload: its ETag is no digest of the whole."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self.store, self.key, self.size = store, key, size
        self.data = bytearray()

    def write_at(self, offset: int, data: Buffer) -> None:
        if offset != len(self.data):
            raise StorageError(f"{self.key}: byte {offset} written after byte {len(self.data)}")
        self.data += data

    def close(self) -> None:
        if len(self.data) != self.size:
            raise StorageError(f"{self.key}: {len(self.data)} bytes written of {self.size}")
        etag = hashlib.md5(hashlib.md5(self.data).digest()).hexdigest() + "-1"
        self.store.bucket.ask("put", self.key, bytes(self.data), etag, False, None)

    def abort(self) -> None:
        self.data.clear()
