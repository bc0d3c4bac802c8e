"""The work of a copy: many objects at a time, each read once and written once, noted when it is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from ucp.errors import ContentError, CorruptError, NotFoundError
from ucp.lifecycle.arrival import recorded
from ucp.lifecycle.contents import Contents
from ucp.lifecycle.stream import OnProgress, Reader, check_same, digest, pour
from ucp.plan import Digests
from ucp.run.crc import crc
from ucp.run.executor import as_finished, default_workers
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done, Journal
from ucp.run.progress import Counter
from ucp.store import Entry, Store, Writer

T = TypeVar("T")
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How to copy: whether to read the copy back, and to throw away an unfinished one of something else."""

    verify: bool = False
    restart: bool = False
    workers: int | None = None
    on_progress: OnProgress | None = None


@dataclass(slots=True)
class Moved:
    """What a copy moved and checked so far."""

    copied: int = 0
    verified: int = 0
    resumed: int = 0
    digests: int = 0


class Carrier:
    """Copies the objects of `contents` to `destination` and reads them back."""

    def __init__(self, contents: Contents, destination: Store, how: How) -> None:
        self.contents, self.destination, self.how = contents, destination, how
        self.workers = how.workers or max(default_workers(), contents.store.parallel, destination.parallel)
        self.counter = Counter(contents.nbytes * (2 if how.verify else 1), len(contents.objects))
        self.moved = Moved()

    def carry(self, there: Collection[str], journal: Journal) -> dict[str, int]:
        """Copy all objects but the roots and those that are `there`; the crc32c of each.

        What the stores raise; CorruptError for what fails the source's own digests. Noted in `journal` on the way out.
        """
        found: dict[str, int] = {}
        todo = [entry for entry in self.contents.large if entry.path not in there]
        for path in there:
            self.counter.skip(self.contents.objects[path].size)
        self.moved.resumed = len(there)
        flushed = self.counter.seconds
        try:
            for finished in self._each(todo, self._copied, self.contents.store):
                if finished is not None:
                    entry, value, digests = finished
                    found[entry.path] = value
                    journal.add(Done(entry.path, Digests((value,), ()), ()))
                    self._count(entry, digests)
                if self.counter.seconds - flushed > _FLUSH_SECONDS:
                    journal.flush()
                    flushed = self.counter.seconds
        finally:
            journal.flush()
        return found

    def read_roots(self) -> dict[str, bytes]:
        """The bytes of the roots, by path; CorruptError for what fails the source's own digests."""
        found = {}
        for path in self.contents.roots:
            entry, ledger = self.contents.objects[path], Ledger(self.contents.spans)
            data = self.contents.store.read(path, 0, entry.size)
            ledger.record(path, 0, memoryview(data))
            ledger.verify(self.contents.store)
            found[path] = data
            self.counter.advance(entry.size)
            self._count(entry, _spans(ledger))
        return found

    @staticmethod
    def digests_of(objects: Mapping[str, bytes]) -> dict[str, int]:
        """crc32c of each of some small objects."""
        return {path: crc("crc32c", data) for path, data in objects.items()}

    def read_back(self, digests: Mapping[str, int]) -> None:
        """Read the whole copy; CorruptError if it is not what was copied.

        `digests` are those of this run. What they lack is set against those that the checkpoint or the copy keeps, else
        against the source's bytes.
        """
        check = self._checking(digests)

        def checked(reader: Reader, entry: Entry) -> int:
            check(reader, entry)
            return entry.size

        for size in self._each(list(self.contents.objects.values()), checked, self.destination):
            self.moved.verified += size or 0

    def damaged(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those of `entries` that the destination lacks, or has with other bytes than the source; all are read."""
        check = self._checking({})

        def is_right(reader: Reader, entry: Entry) -> tuple[Entry, bool]:
            try:
                check(reader, entry)
            except (ContentError, NotFoundError):
                return entry, False
            return entry, True

        found = []
        for result in self._each(entries, is_right, self.destination):
            if result is not None:
                entry, right = result
                self.moved.verified += entry.size
                found += [] if right else [entry]
        return found

    def again(self, entries: Sequence[Entry]) -> None:
        """Copy `entries` over what the complete copy has of them, and read them back.

        What is there stays until the new object is whole and right. CorruptError as `carry`, and for a destination that
        damages data.
        """
        for finished in self._each(entries, self._replaced, self.contents.store):
            if finished is not None:
                entry, _, digests = finished
                self._count(entry, digests)
        self.destination.flush([entry.path for entry in entries])
        for entry in self.damaged(entries):
            raise CorruptError(
                f"{self.destination.url}/{entry.path}: was copied again, and holds other bytes than were written",
                hint="the storage damages data: copy to another place",
            )

    def _checking(self, digests: Mapping[str, int]) -> Callable[[Reader, Entry], None]:
        """What raises CorruptError for an object of the destination that is not as it should be; as `read_back`."""
        known = {path: value for path, (_, value) in recorded(self.destination).items()} | dict(digests)
        covered = {checksum.object for checksum in self.contents.checksums} if self.contents.own else set()

        def check(reader: Reader, entry: Entry) -> None:
            self._check(reader, entry, known.get(entry.path), covered=entry.path in covered)

        return check

    def _copied(self, reader: Reader, entry: Entry) -> tuple[Entry, int, int]:
        return self._poured(reader, entry, self.destination.create)

    def _replaced(self, reader: Reader, entry: Entry) -> tuple[Entry, int, int]:
        return self._poured(reader, entry, self.destination.replace)

    def _poured(self, reader: Reader, entry: Entry, start: Callable[[str, int], Writer]) -> tuple[Entry, int, int]:
        ledger = Ledger(self.contents.spans)
        with start(entry.path, entry.size) as writer:
            value = pour(reader, entry, writer, ledger, self.counter.advance)
        return entry, value, _spans(ledger)

    def _check(self, reader: Reader, entry: Entry, wanted: int | None, *, covered: bool) -> None:
        there = self.destination.entry(entry.path)
        if there.size != entry.size:
            raise CorruptError(f"{self.destination.url}/{entry.path}: has {there.size} bytes, not {entry.size}")
        ledger = Ledger(self.contents.spans if covered else Spans(()))
        value = digest(reader, entry, ledger, self.counter.advance)
        if wanted is None and not covered:
            wanted = self._of_source(entry)
        if wanted is not None:
            check_same(self.destination, entry.path, found=value, wanted=wanted)

    def _of_source(self, entry: Entry) -> int:
        with closing(Reader(self.contents.store, threads=1, ahead=1)) as reader:
            return digest(reader, entry, Ledger(Spans(())), lambda _: None)

    def _count(self, entry: Entry, digests: int) -> None:
        self.moved.copied += entry.size
        self.moved.digests += digests
        self.counter.finish_object()

    def _each(self, entries: Sequence[Entry], work: Callable[[Reader, Entry], T], store: Store) -> Iterator[T | None]:
        """Run `work` for each of `entries` of `store`; results as they come, and None now and then."""
        threads = max(1, min(self.workers, len(entries)))
        reader = Reader(store, threads=self.workers, ahead=max(1, self.workers // threads))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="ucp-copy")
        try:
            for future in as_finished([pool.submit(work, reader, entry) for entry in entries]):
                if self.how.on_progress is not None:
                    self.how.on_progress(self.counter.progress())
                yield None if future is None else future.result()
        except BaseException:
            self.counter.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            reader.close()


def _spans(ledger: Ledger) -> int:
    """How many digests were set against what `ledger` noted."""
    return len({piece.span for piece in ledger.pieces()})
