"""Copy a checkpoint between any two stores: byte for byte, verified on the way, resumable, the root last.

What was copied is noted in a journal in the destination, as a conversion does it: a copy that was cut short anywhere
goes on where it stopped, and is no checkpoint before its last root is put.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ucp.errors import InterruptedRunError, StorageError
from ucp.lifecycle.arrival import check_still_none, claimed, examine, put_last, record, remains
from ucp.lifecycle.carry import Carrier, How
from ucp.lifecycle.contents import COPIED, Contents, read_contents
from ucp.lifecycle.pooled import shared_there
from ucp.lifecycle.stream import OnProgress
from ucp.run.claim import Claim, withdraw
from ucp.run.destination import check_whole, lost, refuse_overlap
from ucp.run.journal import Journal
from ucp.store import Store, open_store


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did. `digests` counts the source's own, which were set against the bytes on the way.

    `bytes_verified` were read back from the destination. `resumed_objects` of the `objects` an earlier run had copied.
    """

    source: str
    destination: str
    family: str
    objects: int
    resumed_objects: int
    bytes_copied: int
    bytes_verified: int
    digests: int
    seconds: float
    already_done: bool


def copy(
    source: str,
    destination: str,
    *,
    family: str | None = None,
    verify: bool = False,
    restart: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> CopyReport:
    """Copy the checkpoint at `source`, of any family that ucp reads, to `destination`; resumes what was cut short.

    Every object is read once and written once, as it is; the digests that the checkpoint keeps are set against the
    bytes on the way, and `verify` reads the copy back. No local disk is used, and about 24 MiB of memory per worker.
    Run on a complete copy, nothing is done but what `verify` asks for. `restart` throws away what an earlier copy of
    something else left unfinished, and says that its writer is gone. `family` and `options` are as in `ucp.open`. A
    checkpoint that is one file is copied into the folder `destination`.

    UsageError if the destination overlaps the source or holds something else; CorruptError for a source that is
    damaged or changes meanwhile, ConflictError if another writer was first, StorageError, InterruptedRunError.
    """
    contents = read_contents(source, family=family, **options)
    how = How(verify=verify, restart=restart, workers=workers, on_progress=on_progress)
    return copy_contents(contents, open_store(destination), how)


def copy_contents(contents: Contents, destination: Store, how: How) -> CopyReport:
    """Copy what `copy` read; it raises what `copy` raises."""
    refuse_overlap(contents.store, destination)
    carrier = Carrier(contents, destination, how)
    with (
        destination.exclusive(),
        _interruptible(destination),
        shared_there(contents, destination) as confirm,
    ):
        found = examine(destination, contents, restart=how.restart)
        digests: dict[str, int] = {}
        if found.state != "done":
            held, old = claimed(destination, contents, found), remains(destination, contents)
            digests = _fill(carrier, held, confirm)
            for path in old:
                destination.delete(path)
        withdraw(destination)
        if how.verify:
            carrier.read_back(digests)
    moved = carrier.moved
    return CopyReport(
        contents.store.url,
        destination.url,
        contents.family,
        objects=len(contents.objects),
        resumed_objects=len(contents.objects) if found.state == "done" else moved.resumed,
        bytes_copied=moved.copied,
        bytes_verified=moved.verified,
        digests=moved.digests,
        seconds=carrier.counter.seconds,
        already_done=found.state == "done",
    )


def _fill(carrier: Carrier, claim: Claim, confirm: Callable[[], None]) -> dict[str, int]:
    """Copy what is not there yet, then the roots; crc32c of every object."""
    contents, destination = carrier.contents, carrier.destination
    destination.tidy()
    journal = Journal(destination, claim)
    done = journal.open()
    sizes = {entry.path: entry.size for entry in contents.large}
    gone = {*lost(destination, sizes)} if done else set()
    digests = {path: found.digests.crc32c[0] for path, found in done.items() if path in sizes and path not in gone}
    digests |= carrier.carry(digests, journal)
    roots = carrier.read_roots()
    contents.check_unchanged()
    destination.flush(list(sizes))
    try:
        check_whole(destination, sizes)
    except StorageError:
        check_still_none(destination, contents)
        raise
    digests |= carrier.digests_of(roots)
    confirm()
    _commit(contents, destination, roots, digests)
    return digests


def _commit(contents: Contents, destination: Store, roots: dict[str, bytes], digests: dict[str, int]) -> None:
    """Put the roots in their order, the last one only if nobody else did; then the note that the copy is whole."""
    for path in contents.roots[:-1]:
        destination.put(path, roots[path])
    for path in contents.roots[-1:]:
        put_last(destination, path, roots[path])
    if not contents.own:
        destination.put(COPIED, record(contents, digests))


@contextmanager
def _interruptible(destination: Store) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"{destination.url}: interrupted; what was copied is kept, and is no checkpoint yet",
            hint="run the same command again: it resumes",
        ) from None


__all__ = ["CopyReport", "How", "copy", "copy_contents"]
