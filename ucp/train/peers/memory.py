"""Pieces of host memory under addresses that follow each other, as if they were one object."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from ucp.errors import CorruptError


class Memory:
    """`pieces` of host memory, one after another; byte `starts[i]` of the whole is the first one of piece `i`.

    The pieces must not change as long as somebody may read them.
    """

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = [piece.cast("B") for piece in pieces if piece.nbytes]
        self.starts: list[int] = []
        self.nbytes = 0
        for piece in self.pieces:
            self.starts.append(self.nbytes)
            self.nbytes += piece.nbytes

    def views(self, offset: int, length: int) -> Iterator[memoryview]:
        """The memory of `length` bytes from `offset`, in order; CorruptError where there is none."""
        if offset < 0 or length < 0 or offset + length > self.nbytes:
            raise CorruptError(f"{length} bytes from {offset} of memory that ends at {self.nbytes}")
        number = bisect_right(self.starts, offset) - 1
        while length:
            piece, at = self.pieces[number], offset - self.starts[number]
            view = piece[at : at + length]
            yield view
            offset, length, number = offset + len(view), length - len(view), number + 1
