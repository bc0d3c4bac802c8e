"""Bytes on their way from one store to another: read ahead, digested as they pass, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ucp.errors import CorruptError
from ucp.run.crc import crc
from ucp.run.integrity import Ledger
from ucp.run.progress import Progress
from ucp.store import Entry, Store, Writer

WINDOW_BYTES = 8 << 20
"""Bytes of one read. Of a request to an object store, as much takes longer than its latency."""

Advance = Callable[[int], None]
"""Called with the bytes of each finished window."""

OnProgress = Callable[[Progress], None]
"""Called now and then with how far a run is."""


class Reader:
    """Reads objects of a store in windows, a few of them ahead; one pool for all objects that are read at a time."""

    def __init__(self, store: Store, *, threads: int, ahead: int) -> None:
        self.store = store
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ucp-read")

    def windows(self, path: str, size: int) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of the `size` bytes of an object, in order; what the store raises.

        The bytes are there until the next are asked for: memory is used again, since new pages cost as much as reading.
        """
        waiting: deque[tuple[int, Future[memoryview]]] = deque()
        buffers = [bytearray(min(WINDOW_BYTES, size)) for _ in range(min(self.ahead + 1, -(-size // WINDOW_BYTES)))]
        try:
            for number, offset in enumerate(range(0, size, WINDOW_BYTES)):
                if number >= len(buffers):
                    at, future = waiting.popleft()
                    yield at, future.result()
                view = memoryview(buffers[number % len(buffers)])[: size - offset]
                waiting.append((offset, self._pool.submit(self._read, path, offset, view)))
            while waiting:
                at, future = waiting.popleft()
                yield at, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, path: str, offset: int, buffer: memoryview) -> memoryview:
        self.store.read_into(path, offset, buffer)
        return buffer


def pour(reader: Reader, entry: Entry, writer: Writer, ledger: Ledger, advance: Advance) -> int:
    """Write the object `entry` as it is; its crc32c. `ledger` notes what was read for the source's own digests.

    CorruptError where these, or the size that a listing told, are not those of the bytes: nothing is closed then.
    """
    value = 0
    for offset, data in reader.windows(entry.path, entry.size):
        ledger.record(entry.path, offset, data)
        value = crc("crc32c", data, value)
        writer.write_at(offset, data)
        advance(len(data))
    ledger.verify(reader.store)
    return value


def digest(reader: Reader, entry: Entry, ledger: Ledger, advance: Advance) -> int:
    """crc32c of the object `entry`, read for the sake of it; CorruptError where it fails a digest of `ledger`."""
    value = 0
    for offset, data in reader.windows(entry.path, entry.size):
        ledger.record(entry.path, offset, data)
        value = crc("crc32c", data, value)
        advance(len(data))
    ledger.verify(reader.store)
    return value


def check_same(store: Store, path: str, *, found: int, wanted: int) -> None:
    """CorruptError if the object at `path`, read back, has another crc32c than what was written."""
    if found != wanted:
        raise CorruptError(
            f"{store.url}/{path}: holds other bytes than were written to it",
            hint="the storage or the way to it damages data: delete the copy and copy again",
        )


__all__ = ["WINDOW_BYTES", "OnProgress", "Reader", "check_same", "digest", "pour"]
