"""Setting what ranks have read between them against the checksums that a source keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ucp.catalog import Catalog
from ucp.run.integrity import Ledger, Piece, Spans
from ucp.store import Store
from ucp.train.crew import Crew

_GAP = 64 << 10
"""Bytes that may be read beyond what was asked for, per checksum, to make it tell."""

_MOST_PIECES = 1024
"""Parts of one checksum's bytes, not next to each other, that a rank tells the others of."""


def ledger_of(catalog: Catalog, crew: Crew, *, verify: bool) -> Ledger:
    """A ledger for what this rank will read; without `verify` it digests nothing."""
    # What a rank reads alone in very many parts is told to nobody, so it need not be digested.
    return Ledger(Spans(catalog.checksums if verify else ()), finest=_MOST_PIECES if crew.size == 1 else 0)


def telling(ledger: Ledger) -> list[Piece]:
    """What this rank read, but for checksums of which it read very many small parts: too much to tell others."""
    counts = Counter(piece.span for piece in ledger.pieces())
    return [piece for piece in ledger.pieces() if counts[piece.span] <= _MOST_PIECES]


def check_together(ledger: Ledger, pieces: Sequence[Sequence[Piece]], crew: Crew, store: Store) -> tuple[int, int]:
    """Check this rank's share of the spans of which the crew read nearly all, and read their rest (padding, mostly).

    `pieces` are what each rank tells. Returns the bytes read for that, and the bytes checked; CorruptError where a
    checksum is wrong. Where two ranks read the same bytes and may have read different copies of them, what each of them
    read is checked by itself: that one read what it should says nothing of the other.
    """
    known = Ledger(ledger.spans)
    shares = [[piece for piece in rank if piece.span % crew.size == crew.rank] for rank in pieces]
    known.add(piece for share in shares for piece in share)
    sizes = {piece.span: ledger.spans.checksums[piece.span].length for piece in known.pieces()}
    missing = dict(sizes)
    for piece in known.pieces():
        missing[piece.span] -= piece.length
    nearly = {span for span, n in missing.items() if n <= max(_GAP, sizes[span] // 64)}
    doubtful = nearly & _doubtful(shares, copies=getattr(store, "copies", 1) > 1)
    checked = Ledger(ledger.spans)
    checked.add(piece for piece in known.pieces() if piece.span in nearly - doubtful)
    extra = checked.verify(store)
    for share in shares if doubtful else ():
        alone = Ledger(ledger.spans)
        alone.add(piece for piece in share if piece.span in doubtful)
        extra += alone.verify(store)
    return extra, sum(sizes[span] for span in nearly)


def _doubtful(shares: Sequence[Sequence[Piece]], *, copies: bool) -> set[int]:
    """Spans of which two ranks read the same bytes with different digests; with `copies`, or cannot be compared."""
    found: set[int] = set()
    before, end = Piece(-1, 0, 0, 0), 0
    every = (piece for share in shares for piece in share)
    for piece in sorted(every, key=lambda piece: (piece.span, piece.offset, -piece.length, piece.value)):
        if piece.span != before.span:
            end = piece.offset
        elif piece.offset < end and piece != before:
            same = (piece.offset, piece.length) == (before.offset, before.length)
            found |= {piece.span} if same or copies else set()
        end, before = max(end, piece.offset + piece.length), piece
    return found


def check_alone(ledger: Ledger, store: Store) -> tuple[int, int]:
    """Check every span of which this rank read anything, and read its rest; as `check_together`.

    Copies that several ranks read each for itself may differ: what one of them read says nothing of the others'.
    """
    spans = {piece.span for piece in ledger.pieces()}
    return ledger.verify(store), sum(ledger.spans.checksums[span].length for span in spans)
