"""Finding copies whose bytes are not what they were."""

from __future__ import annotations

from collections.abc import Iterable

from ucp.catalog import Checksum
from ucp.errors import ContentError, NotFoundError
from ucp.run.crc import crc
from ucp.store import Store

_BLOCK_BYTES = 8 << 20


def damaged(store: Store, checksums: Iterable[Checksum]) -> tuple[str, ...]:
    """The objects of `store` that differ from `checksums`; one that is not there is not damaged."""
    bad: dict[str, None] = {}
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for checksum in checksums:
        if checksum.object not in bad and not _holds(store, checksum, buffer):
            bad[checksum.object] = None
    return tuple(bad)


def _holds(store: Store, checksum: Checksum, buffer: memoryview) -> bool:
    value, at, end = 0, checksum.offset, checksum.offset + checksum.length
    try:
        while at < end:
            piece = buffer[: min(len(buffer), end - at)]
            store.read_into(checksum.object, at, piece)
            value = crc(checksum.algorithm, piece, value)
            at += len(piece)
    except NotFoundError:
        return True
    except ContentError:
        return False
    return value == checksum.value
