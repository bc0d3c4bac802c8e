"""Objects put right: a whole new one takes the place of the damaged one, and is read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ucp.errors import CorruptError
from ucp.lifecycle.damage import Damage, examine
from ucp.lifecycle.origins import Offer
from ucp.lifecycle.stream import WINDOW_BYTES, Reader, check_same
from ucp.run.crc import crc
from ucp.run.integrity import Ledger, Spans
from ucp.store import Store
from ucp.store.mounted import MountedStore


def rewrite(reader: Reader, damage: Damage, offers: Mapping[int, Offer]) -> None:
    """Replace the object by one with its sound bytes and, from the byte of each of `offers` on, those of the offer.

    Every digest is set against the bytes before the object takes its place, and again when it is read back.
    CorruptError where they fail: the damaged object then stays.
    """
    store, path = _place(reader.store, damage.path)
    ledger, at = Ledger(Spans(damage.checksums)), 0
    with store.replace(path, damage.size) as writer:
        for data in _bytes(reader.store, damage, offers):
            ledger.record(damage.path, at, data)
            writer.write_at(at, data)
            at += len(data)
        if at != damage.size:
            raise CorruptError(f"{reader.store.url}/{damage.path}: its parts have {at} bytes, not {damage.size}")
        ledger.verify(reader.store)
    if examine(reader, damage.path, damage.size, damage.checksums, lambda _: None) is not None:
        raise CorruptError(
            f"{reader.store.url}/{damage.path}: was repaired, and holds other bytes than were written",
            hint="the storage damages data: repair into another place with `ucp cp`",
        )


def put_small(store: Store, path: str, data: bytes) -> None:
    """Put a small object in place of a damaged one, and read it back."""
    store.put(path, data)
    check_same(store, path, found=crc("crc32c", store.read(path)), wanted=crc("crc32c", data))


def _bytes(store: Store, damage: Damage, offers: Mapping[int, Offer]) -> Iterator[memoryview]:
    """All bytes of the object in order, a piece at a time."""
    at = 0
    for span in damage.spans:
        yield from _kept(store, damage.path, at, span.offset)
        yield from offers[span.offset].fetch()
        at = span.offset + span.length
    yield from _kept(store, damage.path, at, damage.size)


def _kept(store: Store, path: str, start: int, stop: int) -> Iterator[memoryview]:
    for at in range(start, stop, WINDOW_BYTES):
        yield memoryview(store.read(path, at, min(WINDOW_BYTES, stop - at)))


def _place(store: Store, path: str) -> tuple[Store, str]:
    """Where the object really lies: what is shared, in the pool beside the checkpoint."""
    if isinstance(store, MountedStore) and path.startswith(store.prefix):
        return store.pool, path.removeprefix(store.prefix)
    return store, path
