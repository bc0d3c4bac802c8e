"""Writing: small objects with one request, large ones in parts that are sent while the caller goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import numpy as np

from ucp.errors import NotFoundError, StorageError, UcpError
from ucp.store.base import Buffer, Writer
from ucp.store.cloud.client import Client
from ucp.store.cloud.failure import NO_BUCKET, RequestError
from ucp.store.cloud.ranges import PART_BYTES
from ucp.store.cloud.retry import Policy, persistently

_MOST_PARTS = 9_000
"""Of 10,000 that S3 takes."""
_PARTS_AT_ONCE = 4
_PARTS_OF_ALL = 16
"""Parts on their way at once, of one object and about so many of all objects that a process writes."""
_ROUND = 1 << 20


def writer(client: Client, key: str, size: int, *, name: str) -> Writer:
    """A writer of `size` bytes. Nothing can be seen of the object before it is closed."""
    if size <= PART_BYTES:
        return _SmallWriter(client, key, size, name)
    return _LargeWriter(client, key, size, name)


class _SmallWriter(Writer):
    """Keeps the object in memory and puts it at the end."""

    def __init__(self, client: Client, key: str, size: int, name: str) -> None:
        self.client = client
        self.key = key
        self.size = size
        self.name = name
        self.data = bytearray()

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        _check_place(self.name, offset, len(view), position=len(self.data), size=self.size)
        self.data += view

    def close(self) -> None:
        _check_whole(self.name, len(self.data), self.size)
        try:
            self.client.put(self.key, self.data)
            return
        except RequestError as error:
            failed = error
        raise failed.public(self.name) from None

    def abort(self) -> None:
        self.data = bytearray()


class _Uploads:
    """How many objects this process is writing in parts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0

    def begin(self) -> int:
        """One more; gives how many of its parts may be on their way at once."""
        with self.lock:
            self.count += 1
            return max(1, min(_PARTS_AT_ONCE, _PARTS_OF_ALL // self.count))

    def end(self) -> None:
        """One less."""
        with self.lock:
            self.count -= 1


_uploads = _Uploads()


class _LargeWriter(Writer):
    """Fills one part while those before are sent; blocks when as many are on their way as may be at once."""

    def __init__(self, client: Client, key: str, size: int, name: str) -> None:
        self.client = client
        self.key = key
        self.size = size
        self.name = name
        self.position = 0
        self.part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS // _ROUND) * _ROUND)
        self.part = np.empty(0, np.uint8)
        self.filled = 0
        self.parts = _Parts()
        self.most = _uploads.begin()
        self.failed: UcpError | None = StorageError(f"{name}: the upload did not end")
        self.thread = threading.Thread(target=self._send, name="ucp-upload", daemon=True)
        self.thread.start()

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        _check_place(self.name, offset, len(view), position=self.position, size=self.size)
        source = np.frombuffer(view, np.uint8) if len(view) else np.empty(0, np.uint8)
        while len(source):
            if not len(self.part):
                self.part = np.empty(min(self.part_bytes, self.size - self.position), np.uint8)
            count = min(len(source), len(self.part) - self.filled)
            # NumPy lets other threads run while it copies.
            np.copyto(self.part[self.filled : self.filled + count], source[:count])
            source = source[count:]
            self.filled += count
            self.position += count
            if self.filled == len(self.part):
                self._hand_over()

    def _hand_over(self) -> None:
        part, self.part, self.filled = self.part[: self.filled].data, np.empty(0, np.uint8), 0
        if not self.parts.put(part):
            self.thread.join()
            raise self.failed or StorageError(f"{self.name}: the upload ended early")

    def close(self) -> None:
        try:
            _check_whole(self.name, self.position, self.size)
            if self.filled:
                self._hand_over()
        except BaseException:
            self.abort()
            raise
        self.parts.finish()
        self.thread.join()
        if self.failed is not None:
            raise self.failed

    def abort(self) -> None:
        self.part = np.empty(0, np.uint8)
        self.parts.give_up()
        self.thread.join()

    def _send(self) -> None:
        """Run the upload; the client tries each part again by itself."""
        once = Policy(attempts=1)
        try:
            persistently(once, (self.client.family, "part"), self._upload, written=self.size)
            self.failed = None
        except RequestError as error:
            self.failed = self._told(error)
        except _GivenUp:
            return
        finally:
            _uploads.end()
            self.parts.stop()

    def _told(self, error: RequestError) -> UcpError:
        """What to say. Tried again after its answer was lost, the end of an upload finds nothing left to end."""
        told = error.public(self.name)
        if isinstance(told, NotFoundError) and error.failure.word not in NO_BUCKET:
            return StorageError(f"{self.name}: the end of an upload was lost", hint="run the same command again")
        return told

    def _upload(self) -> None:
        self.client.upload(self.key, iter(self.parts), part_bytes=self.part_bytes, most=self.most)


class _GivenUp(Exception):
    """Raised into the upload so that it tells the service to forget the parts."""


class _Parts:
    """Parts on their way from the writer to the upload, one at a time."""

    def __init__(self) -> None:
        self.waiting: deque[memoryview] = deque()
        self.changed = threading.Condition()
        self.finished = self.given_up = self.stopped = False

    def put(self, part: memoryview) -> bool:
        """Hand a part over and wait until it is taken; False if the upload takes no more."""
        with self.changed:
            self.waiting.append(part)
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.waiting or self.stopped)
            return not self.stopped

    def finish(self) -> None:
        """There are no more parts."""
        with self.changed:
            self.finished = True
            self.changed.notify_all()

    def give_up(self) -> None:
        """The object is not wanted any more."""
        with self.changed:
            self.given_up = True
            self.changed.notify_all()

    def stop(self) -> None:
        """The upload has ended, one way or the other."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def __iter__(self) -> Iterator[memoryview]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.finished or self.given_up)
                if self.given_up:
                    raise _GivenUp
                if not self.waiting:
                    return
                part = self.waiting.popleft()
                self.changed.notify_all()
            yield part


def _check_place(name: str, offset: int, length: int, *, position: int, size: int) -> None:
    if offset != position:
        raise StorageError(f"{name}: byte {offset} written after byte {position}")
    if offset + length > size:
        raise StorageError(f"{name}: {offset + length} bytes written of {size}")


def _check_whole(name: str, written: int, size: int) -> None:
    if written != size:
        raise StorageError(f"{name}: {written} bytes written of {size}")
