"""Which bytes of an object are not those that were digested: read once, set against every digest of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp.catalog import Checksum
from ucp.errors import NotFoundError
from ucp.format.records import File
from ucp.lifecycle.stream import Advance, Reader
from ucp.run.crc import crc
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.store import Store


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with the object at `path`: `spans` fail their digests, and it has `found` bytes (None: missing).

    `size` is what it should have; `checksums` are all that it has.
    """

    path: str
    size: int
    found: int | None
    spans: tuple[Checksum, ...]
    checksums: tuple[Checksum, ...]

    @property
    def kind(self) -> str:
        """``missing``, ``truncated``, ``too-long`` or ``damaged``."""
        if self.found is None:
            return "missing"
        return "truncated" if self.found < self.size else "too-long" if self.found > self.size else "damaged"

    @property
    def provable(self) -> bool:
        """Whether every byte that is not there is one of `spans`: what has no digest can only be kept."""
        at = min(self.found or 0, self.size)
        for span in self.spans:
            if span.offset > at:
                return False
            at = max(at, span.offset + span.length)
        return at == self.size


def by_object(checksums: Sequence[Checksum]) -> Mapping[str, list[Checksum]]:
    """The digests of each object, by offset; those of no bytes are left out."""
    found: dict[str, list[Checksum]] = defaultdict(list)
    for checksum in checksums:
        if checksum.length:
            found[checksum.object].append(checksum)
    return {path: sorted(spans, key=lambda span: span.offset) for path, spans in found.items()}


def examine(reader: Reader, path: str, size: int, checksums: Sequence[Checksum], advance: Advance) -> Damage | None:
    """What is wrong with an object that should have `size` bytes and these digests; None if nothing is."""
    try:
        found: int | None = reader.store.entry(path).size
    except NotFoundError:
        found = None
    ledger = Ledger(Spans(checksums))
    for offset, data in reader.windows(path, min(size, found or 0)):
        ledger.record(path, offset, data)
        advance(len(data))
    advance(size - min(size, found or 0))
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for piece in ledger.pieces():
        pieces[piece.span].append(piece)
    failing = tuple(span for number, span in enumerate(checksums) if not _agrees(span, pieces[number]))
    if not failing and found == size:
        return None
    return Damage(path, size, found, failing, tuple(checksums))


def right_file(store: Store, path: str, file: File) -> bytes | None:
    """The bytes of the small object at `path` if they are those that `file` digests, else None."""
    try:
        if store.entry(path).size != file.size:
            return None
        data = store.read(path, 0, file.size)
    except NotFoundError:
        return None
    return data if crc("crc32c", data) == file.crc32c else None


def _agrees(span: Checksum, pieces: Sequence[Piece]) -> bool:
    if len(pieces) != 1:
        return False  # neighbours are joined: in more than one piece, something between was not read
    piece = pieces[0]
    return (piece.offset, piece.length, piece.value) == (span.offset, span.length, span.value)
