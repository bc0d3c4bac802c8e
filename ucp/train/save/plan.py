"""Who writes what: every box once, the bytes spread evenly over the ranks that hold it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ucp.errors import ConflictError
from ucp.format.native_shard import Piece
from ucp.layout import Box

SLAB_BYTES = 32 << 20
"""Pieces that several ranks hold are cut into slabs of at most so many bytes, so that each can write some of them."""

Digest = Literal["", "crc32c", "device"]
"""How copies of a piece are compared: not at all, by the digest of its blocks, or by one that a device computes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """`piece` is what to write or to compare, a box of `of`, which the rank holds."""

    piece: Piece
    of: Piece
    compare: Digest = ""

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the memory of `of`."""
        starts = zip(self.piece.box.start, self.of.box.start, self.piece.box.shape, strict=True)
        return tuple(slice(at - origin, at - origin + length) for at, origin, length in starts)


@dataclass(frozen=True, slots=True)
class Plan:
    """A rank's part in saves of one layout: what it writes, and the copies that others write which it compares."""

    version: int
    write: tuple[Cut, ...]
    check: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank holds, those of it on a device, and what it has staged: None if that is everything."""

    pieces: Sequence[Piece]
    on_device: frozenset[Piece] = frozenset()
    staged: frozenset[Piece] | None = None


def assign(version: int, holdings: Sequence[Holding], is_buffer: Callable[[Piece], bool]) -> list[Plan]:
    """The plan of each rank.

    Of a buffer the lowest rank's copy is taken, and no copies are compared. Only what a rank has staged is written by
    it; ConflictError where nobody has staged a part of a piece.
    """
    holders: dict[Piece, list[int]] = defaultdict(list)
    for rank, holding in enumerate(holdings):
        for piece in holding.pieces:
            holders[piece].append(rank)
    writes: list[list[Cut]] = [[] for _ in holdings]
    checks: list[list[Cut]] = [[] for _ in holdings]
    loads = [0] * len(holdings)
    for piece in sorted(holders, key=lambda piece: (len(holders[piece]) > 1, -piece.nbytes)):
        ranks = holders[piece][:1] if is_buffer(piece) else holders[piece]
        compare = _digest(piece, [holdings[rank] for rank in ranks])
        for box, able in _able(piece, ranks, holdings).items():
            cut, writer = Cut(box, piece, compare), min(able, key=loads.__getitem__)
            writes[writer].append(cut)
            loads[writer] += box.nbytes
            for rank in ranks:
                if rank != writer:
                    checks[rank].append(cut)
    return [Plan(version, tuple(write), tuple(check)) for write, check in zip(writes, checks, strict=True)]


def slabs(piece: Piece) -> Iterator[Piece]:
    """`piece` in row-major order, at most SLAB_BYTES at a time: the same ones on every rank that holds it."""
    if piece.nbytes <= SLAB_BYTES:
        yield piece
        return
    start, shape = piece.box.start, piece.box.shape
    dim = next(number for number, length in enumerate(shape) if length > 1)
    rows = max(1, SLAB_BYTES * shape[dim] // piece.nbytes)
    for at in range(0, shape[dim], rows):
        length = min(rows, shape[dim] - at)
        box = Box((*start[:dim], start[dim] + at, *start[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :]))
        yield from slabs(Piece(piece.key, piece.dtype, box))


def _able(piece: Piece, ranks: Sequence[int], holdings: Sequence[Holding]) -> dict[Piece, list[int]]:
    """The boxes that a piece is written in, each with the ranks that can write it."""
    cut = list(slabs(piece))
    for boxes in ([piece] if len(ranks) == 1 else cut, [piece], cut):
        able = {box: [rank for rank in ranks if _has(holdings[rank], box)] for box in boxes}
        if all(able.values()):
            return able
    raise ConflictError(
        f"{piece.key}: no rank has staged all of it, since the layout has changed on some of the ranks only",
        hint="save once more: the new layout is known from now on",
    )


def _has(holding: Holding, box: Piece) -> bool:
    return holding.staged is None or box in holding.staged


def _digest(piece: Piece, holdings: Sequence[Holding]) -> Digest:
    if len(holdings) < 2:
        return ""
    return "device" if all(piece in holding.on_device for holding in holdings) else "crc32c"
