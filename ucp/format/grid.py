"""How the array of a tensor is cut: into inner chunks for Zarr, and along dim 0 into objects.

An inner chunk is one run of a state's row-major bytes: leading dims 1, then rows of one dim, then everything below.
Its height divides that dim, so that no chunk reaches past the tensor and needs padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ucp.errors import UsageError
from ucp.layout import FlatRange, Shape, itemsize, numel

CHUNK_BYTES = 4 << 20
"""Size that inner chunks should have."""

SHARD_BYTES = 1 << 30
"""Size that objects should have, all states together."""

_GOOD = (64 << 10, 64 << 20)
_SMALLEST = 1600
"""An index entry has 16 bytes, so from this chunk size on the index is at most 1 % of the data."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The cut of `states` equal states of a tensor of `shape`: inner `chunk` (one state), `rows` of dim 0 per object.

    Of a scalar, `chunk` is empty and `rows` 1. A tensor without elements has no objects.
    """

    states: int
    shape: Shape
    dtype: str
    chunk: Shape
    rows: int

    @classmethod
    def choose(cls, states: int, shape: Shape, dtype: str, *, shard_bytes: int = SHARD_BYTES) -> Grid:
        """Chunks near CHUNK_BYTES, objects near `shard_bytes`; UsageError if that is not positive."""
        if shard_bytes < 1:
            raise UsageError(f"shard_bytes must be at least 1, not {shard_bytes}")
        if not numel(shape):
            return cls(states, shape, dtype, tuple(max(1, n) for n in shape), max(1, shape[0]))
        chunk = inner_chunk(shape, itemsize(dtype), near=min(CHUNK_BYTES, max(1, shard_bytes // states)))
        if not shape:
            return cls(states, shape, dtype, chunk, 1)
        units = shape[0] // chunk[0]
        objects = min(units, -(-states * numel(shape) * itemsize(dtype) // shard_bytes))
        return cls(states, shape, dtype, chunk, -(-units // objects) * chunk[0])

    @property
    def row_elements(self) -> int:
        """Elements of one row of dim 0; of a scalar, 1."""
        return numel(self.shape[1:])

    @property
    def height(self) -> int:
        """Size of dim 0; of a scalar, 1."""
        return self.shape[0] if self.shape else 1

    @property
    def count(self) -> int:
        """Number of objects."""
        return -(-self.height // self.rows) if numel(self.shape) else 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk."""
        return numel(self.chunk) * itemsize(self.dtype)

    def rows_of(self, number: int) -> int:
        """Rows of dim 0 in object `number`; the last object may have fewer."""
        return min(self.rows, self.height - number * self.rows)

    def region(self, number: int) -> FlatRange:
        """The flat range of the tensor that object `number` holds, of every state."""
        return FlatRange(number * self.rows * self.row_elements, self.rows_of(number) * self.row_elements)

    def part_shape(self, number: int) -> Shape:
        """Shape of each state inside object `number`."""
        return (self.rows_of(number), *self.shape[1:]) if self.shape else ()

    def run_bytes(self, number: int) -> int:
        """Bytes of each state inside object `number`."""
        return self.region(number).length * itemsize(self.dtype)

    def blocks(self, number: int, block_bytes: int) -> int:
        """Digest blocks of object `number`, all states together."""
        step = block_bytes // itemsize(self.dtype)
        return self.states * -(-self.region(number).length // step)

    @property
    def chunks_per_shard(self) -> int:
        """Entries of the Zarr shard index, which counts the rows of a full object even in a shorter one."""
        full = (self.rows, *self.shape[1:]) if self.shape else ()
        return self.states * math.prod(n // c for n, c in zip(full, self.chunk, strict=True))

    def index_bytes(self, number: int, block_bytes: int) -> int:
        """Bytes after the data of object `number`: a crc32c per block, the shard index, its crc32c."""
        return 4 * self.blocks(number, block_bytes) + 16 * self.chunks_per_shard + 4

    def key(self, number: int) -> str:
        """Zarr chunk key of object `number` (core spec, "default" chunk key encoding)."""
        return "/".join(["c", "0", *([str(number)] if self.shape else []), *("0" for _ in self.shape[1:])])


def inner_chunk(shape: Shape, size: int, *, near: int = CHUNK_BYTES) -> Shape:
    """The inner chunk of a tensor of `shape` with `size` bytes per element, as `near` a size as division allows.

    Where only very small and very large ones divide, small ones are taken as long as their index stays below 1 %.
    """
    return min(_candidates(shape), key=lambda chunk: _rank(numel(chunk) * size, near))


def _candidates(shape: Shape) -> Iterator[Shape]:
    if not shape:
        yield ()
    for dim, length in enumerate(shape):
        for rows in _divisors(length):
            yield (*(1,) * dim, rows, *shape[dim + 1 :])


def _divisors(number: int) -> Iterator[int]:
    for small in range(1, math.isqrt(number) + 1):
        if number % small == 0:
            yield small
            yield number // small


def _rank(nbytes: int, near: int) -> tuple[float, ...]:
    low, high = max(_SMALLEST, min(_GOOD[0], near // 2)), _GOOD[1]
    if low <= nbytes <= high:
        return (0, max(nbytes, near) / min(nbytes, near), nbytes)
    if _SMALLEST <= nbytes < low:
        return (1, -nbytes)
    return (2, nbytes) if nbytes > high else (3, -nbytes)
