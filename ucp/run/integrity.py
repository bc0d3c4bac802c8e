"""The ledger: digests of what was read, set against the digests that the source keeps.

Ranges are read in any order, by many workers, in blocks that do not match the source's own digested spans. Each range's
CRC is noted as it passes through memory and combined at the end; only bytes that nobody wanted (padding between or
after tensors) are read for the sake of the check.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ucp.catalog import Checksum
from ucp.errors import CorruptError
from ucp.run.crc import combine, crc
from ucp.store import Store

_GAP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """CRC of `length` bytes at absolute `offset`, inside the span of checksum number `span`."""

    span: int
    offset: int
    length: int
    value: int


class Spans:
    """A list of checksums, indexed by object and offset; made once, shared by many ledgers."""

    def __init__(self, checksums: Sequence[Checksum]) -> None:
        self.checksums = checksums
        self._index: dict[str, tuple[list[int], list[int]]] = {}
        by_object: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, checksum in enumerate(checksums):
            by_object[checksum.object].append((checksum.offset, number))
        for name, spans in by_object.items():
            spans.sort()
            self._index[name] = ([offset for offset, _ in spans], [number for _, number in spans])

    def touched(self, object: str, offset: int, stop: int) -> Iterator[int]:
        """Numbers of the checksums whose span meets ``[offset, stop)`` of `object`."""
        if object not in self._index or offset >= stop:
            return
        offsets, numbers = self._index[object]
        for at in range(max(0, bisect_right(offsets, offset) - 1), len(numbers)):
            if offsets[at] >= stop:
                return
            if offsets[at] + self.checksums[numbers[at]].length > offset:
                yield numbers[at]


class Ledger:
    """Collects pieces for indexed checksums, and counts `bytes_read`; safe to use from several threads.

    Pieces of fewer than one part in `finest` of their span are not noted, if that is given.
    """

    def __init__(self, spans: Spans, *, finest: int = 0) -> None:
        self.spans = spans
        self.finest = finest
        self.bytes_read = 0
        self._pieces: list[Piece] = []
        self._lock = threading.Lock()

    def record(self, object: str, offset: int, data: memoryview) -> None:
        """Note that `data` was read from `object` at `offset`."""
        found = list(self._digest(object, offset, data))
        with self._lock:
            self.bytes_read += len(data)
            self._pieces.extend(found)

    def _digest(self, object: str, offset: int, data: memoryview) -> Iterator[Piece]:
        stop = offset + len(data)
        for number in self.spans.touched(object, offset, stop):
            checksum = self.spans.checksums[number]
            a, b = max(offset, checksum.offset), min(stop, checksum.offset + checksum.length)
            if (b - a) * self.finest < checksum.length and self.finest:
                continue
            yield Piece(number, a, b - a, crc(checksum.algorithm, data[a - offset : b - offset]))

    def pieces(self) -> list[Piece]:
        """What was noted so far, neighbours joined: few, whatever the number of reads."""
        with self._lock:
            self._pieces = self._joined(self._pieces)
            return list(self._pieces)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Take over pieces of another ledger for the same spans."""
        with self._lock:
            self._pieces.extend(pieces)

    def _joined(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Pieces in order, overlaps dropped, runs of neighbours combined."""
        joined: list[Piece] = []
        for piece in sorted(pieces, key=lambda p: (p.span, p.offset, -p.length)):
            last = joined[-1] if joined else None
            if last is None or last.span != piece.span or piece.offset > last.offset + last.length:
                joined.append(piece)
            elif piece.offset == last.offset + last.length:
                algorithm = self.spans.checksums[piece.span].algorithm
                value = combine(algorithm, last.value, piece.value, piece.length)
                joined[-1] = Piece(last.span, last.offset, last.length + piece.length, value)
        return joined

    def verify(self, store: Store, *, gap: int | None = None, held: Container[int] = ()) -> int:
        """Compare every span that was touched with its checksum; gaps are read now. Returns the bytes read for that.

        With `gap`, spans of which more than so many bytes are missing, and more than one in 64, are left alone; so are
        those of which anything is missing that `held` before. CorruptError names the object and the bytes.
        """
        extra = 0
        by_span: dict[int, list[Piece]] = defaultdict(list)
        for piece in self.pieces():
            by_span[piece.span].append(piece)
        for span, pieces in sorted(by_span.items()):
            checksum = self.spans.checksums[span]
            missing = checksum.length - sum(piece.length for piece in pieces)
            if missing and (span in held or (gap is not None and missing > max(gap, checksum.length // 64))):
                continue
            extra += missing
            if self._value(store, checksum, pieces) != checksum.value:
                end = checksum.offset + checksum.length
                raise CorruptError(
                    f"{store.url}/{checksum.object}: bytes {checksum.offset}..{end} fail their {checksum.algorithm}",
                    hint="the file is damaged: restore it from another copy",
                )
        return extra

    def _value(self, store: Store, checksum: Checksum, pieces: Sequence[Piece]) -> int:
        value, at = 0, checksum.offset
        for piece in pieces:
            value = self._through(store, checksum, value, at, piece.offset)
            value = combine(checksum.algorithm, value, piece.value, piece.length)
            at = piece.offset + piece.length
        return self._through(store, checksum, value, at, checksum.offset + checksum.length)

    @staticmethod
    def _through(store: Store, checksum: Checksum, value: int, start: int, stop: int) -> int:
        for at in range(start, stop, _GAP_BYTES):
            data = store.read(checksum.object, at, min(_GAP_BYTES, stop - at))
            value = crc(checksum.algorithm, data, value)
        return value
