"""How tensors are cut into chunks and dealt to files: as FSDP cuts them for as many ranks as there are files.

A stock reader takes whole chunks, so a job with one rank per file reads each byte once
(torch/distributed/checkpoint/filesystem.py, ``read_data``).
"""

from __future__ import annotations

from heapq import heapify, heapreplace

from ucp.layout import Box, Shape, itemsize, numel

FILE_BYTES = 512 << 20
"""Bytes of a file where nobody says how many there are to be."""
MOST_FILES = 256
_LEAST_BYTES = 16 << 10


def files_for(nbytes: int) -> int:
    """The number of files for a checkpoint of `nbytes` bytes."""
    return min(MOST_FILES, max(1, -(-nbytes // FILE_BYTES)))


def cut(shape: Shape, dtype: str, pieces: int) -> list[Box]:
    """Cut a tensor along dim 0 into at most `pieces` boxes of as many rows each, the last of fewer.

    That is how FSDP2 cuts (``torch.chunk``). A tensor of a few KiB is cut into fewer pieces: each has a header.
    """
    whole = Box.whole(shape)
    nbytes = numel(shape) * itemsize(dtype)
    if not shape or not nbytes:
        return [whole]
    rows = -(-shape[0] // max(1, min(pieces, nbytes // _LEAST_BYTES)))
    return [
        Box((start, *whole.start[1:]), (min(rows, shape[0] - start), *shape[1:])) for start in range(0, shape[0], rows)
    ]


class Deal:
    """Deals chunks to files so that they come out equally large."""

    def __init__(self, files: int) -> None:
        self.files = files
        self._loads = [(0, number) for number in range(files)]
        heapify(self._loads)

    def deal(self, sizes: list[int]) -> list[int]:
        """The file of each chunk of one tensor, given their bytes: one in each file if they are as many."""
        if len(sizes) == self.files:
            # All files grow alike but for the last chunk, so who is behind stays behind.
            return list(range(self.files))
        return [self._least(size) for size in sizes]

    def _least(self, size: int) -> int:
        load, number = self._loads[0]
        heapreplace(self._loads, (load + size, number))
        return number
