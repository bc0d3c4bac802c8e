"""The shard files of the native distributed form: plain safetensors files (safetensors README, "Format").

Normative text: spec/shard-format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.format.shard import framed
from ucp.layout import Box, itemsize
from ucp.layout.dtypes import SAFETENSORS
from ucp.plan import Key

SHARD_BYTES = 1 << 30
"""Data bytes after which a rank starts another file."""

_LARGE_BYTES, _SHARED_BYTES = 1 << 20, 32 << 20
"""From this size on a piece that is shared has a file of its own; smaller ones go together up to the other."""

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one state of one tensor that a rank writes."""

    key: Key
    dtype: str
    box: Box

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.box.size * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of a rank: its `pieces` follow each other after `header`."""

    path: str
    pieces: tuple[Piece, ...]
    header: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)

    def offsets(self) -> Iterator[tuple[Piece, int]]:
        """Each piece and the byte where it starts."""
        at = len(self.header)
        for piece in self.pieces:
            yield piece, at
            at += piece.nbytes


def shard_files(
    rank: int, pieces: Sequence[Piece], *, tag: str = "", shard_bytes: int = SHARD_BYTES
) -> Iterator[ShardFile]:
    """The files of `rank`: wider elements first, so that all are aligned; a new file after `shard_bytes` bytes.

    `tag` is that of the save, which keeps the files of two attempts apart.
    """
    ordered = sorted(pieces, key=lambda piece: (-itemsize(piece.dtype), piece.key, piece.box.start))
    held: list[Piece] = []
    number = nbytes = 0
    for piece in ordered:
        if held and nbytes + piece.nbytes > shard_bytes:
            yield _file(rank, number, tag, held)
            held, number, nbytes = [], number + 1, 0
        held.append(piece)
        nbytes += piece.nbytes
    if held:
        yield _file(rank, number, tag, held)


def shared_files(pieces: Sequence[Piece]) -> Iterator[ShardFile]:
    """Files that depend on nothing but what they hold, so that they can be shared: their path is not known yet.

    A large piece is a file of its own, small ones go together.
    """
    large = [piece for piece in pieces if piece.nbytes >= _LARGE_BYTES]
    for piece in sorted(large, key=lambda piece: (piece.key, piece.box.start)):
        yield ShardFile("", (piece,), shard_header(None, [piece]))
    small = [piece for piece in pieces if piece.nbytes < _LARGE_BYTES]
    for file in shard_files(0, small, shard_bytes=_SHARED_BYTES):
        yield ShardFile("", file.pieces, shard_header(None, file.pieces))


def _file(rank: int, number: int, tag: str, pieces: Sequence[Piece]) -> ShardFile:
    name = f"rank-{rank:05}-{number}{tag and f'-{tag}'}"
    return ShardFile(f"shards/{name}.safetensors", tuple(pieces), shard_header(rank, pieces))


def shard_header(rank: int | None, pieces: Sequence[Piece]) -> bytes:
    """What is before the data of a file in which `rank` keeps `pieces`, one after the other; of a shared one, None."""
    about = {"ucp": "1.0", "form": "distributed"} | ({} if rank is None else {"rank": str(rank)})
    entries: dict[str, object] = {"__metadata__": about}
    at = 0
    for piece in pieces:
        row = {
            "dtype": SAFETENSORS[piece.dtype],
            "shape": list(piece.box.shape),
            "data_offsets": [at, at + piece.nbytes],
        }
        entries[_name(piece)] = row
        at += piece.nbytes
    return framed(entries, align=_ALIGN)


def _name(piece: Piece) -> str:
    """``name[state]@start``, which says what the bytes are even without the manifest: ``embed.weight[value]@26,0``."""
    return f"{piece.key}@{','.join(map(str, piece.box.start))}"
