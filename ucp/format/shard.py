"""The polyglot object: a safetensors file that is a Zarr v3 shard at the same time.

    u64 LE header length | JSON header, padded with spaces | state 0 | state 1 | … | __ucp_index__

The last tensor, ``__ucp_index__`` (U8), holds the crc32c (u32 LE) of each digest block and then what the Zarr
``sharding_indexed`` codec looks for at the end of a shard: (offset, length) as u64 LE per inner chunk, and a crc32c.
Sources: safetensors README, "Format"; Zarr v3 sharding codec, "Binary shard format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from ucp.format.grid import Grid
from ucp.layout.dtypes import SAFETENSORS
from ucp.plan import BLOCK_BYTES, Digests, Section, Task
from ucp.plan.match import Cover
from ucp.plan.task import Witness

INDEX = "__ucp_index__"
VERSION = "1.0"
_LARGE = 1 << 20
_MISSING = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ShardFrame:
    """Everything but the data of object `number` of one array of tensor `name`; implements `ucp.plan.Frame`."""

    name: str
    states: tuple[str, ...]
    grid: Grid
    number: int
    block_bytes: int = BLOCK_BYTES

    @property
    def needs_crc32(self) -> bool:
        """No: this form knows crc32c only."""
        return False

    @property
    def header(self) -> bytes:
        """The safetensors header with its length.

        Padded so that data starts at a multiple of 8, or of 4096 if there is at least 1 MiB of it.
        """
        run, shape = self.grid.run_bytes(self.number), list(self.grid.part_shape(self.number))
        end = run * len(self.states)
        dtype = SAFETENSORS[self.grid.dtype]
        entries: dict[str, object] = {"__metadata__": self._metadata()}
        for i, state in enumerate(self.states):
            entries[state] = {"dtype": dtype, "shape": shape, "data_offsets": [i * run, (i + 1) * run]}
        length = self.grid.index_bytes(self.number, self.block_bytes)
        entries[INDEX] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        return framed(entries, align=4096 if end >= _LARGE else 8)

    def _metadata(self) -> dict[str, str]:
        """What makes a stray object recognisable; safetensors allows strings only."""
        first = self.number * self.grid.rows if self.grid.shape else 0
        return {
            "ucp": VERSION,
            "tensor": self.name,
            "shape": json.dumps(list(self.grid.shape), separators=(",", ":")),
            "first_row": str(first),
        }

    @property
    def data_start(self) -> int:
        """Offset of the first state."""
        return len(self.header)

    @property
    def index_start(self) -> int:
        """Offset of ``__ucp_index__``."""
        return self.data_start + len(self.states) * self.grid.run_bytes(self.number)

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return self.index_start + self.grid.index_bytes(self.number, self.block_bytes)

    def literals(self) -> Iterator[tuple[int, bytes]]:
        """The header."""
        yield 0, self.header

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        """The index tensor."""
        expected = self.grid.blocks(self.number, self.block_bytes)
        assert len(digests.crc32c) == expected, f"{len(digests.crc32c)} digests for {expected} blocks"
        index = self.shard_index()
        blocks = np.array(digests.crc32c, "<u4").tobytes()
        return self.index_start, blocks + index + struct.pack("<I", crc32c(index))

    def shard_index(self) -> bytes:
        """The Zarr shard index without its crc32c; chunks past the end of a shorter object are marked as missing."""
        run, chunk = self.grid.run_bytes(self.number), self.grid.chunk_bytes
        entries = np.full((len(self.states), self.grid.chunks_per_shard // len(self.states), 2), _MISSING, "<u8")
        present = run // chunk
        starts = self.data_start + run * np.arange(len(self.states), dtype="<u8")
        entries[:, :present, 0] = starts[:, None] + chunk * np.arange(present, dtype="<u8")
        entries[:, :present, 1] = chunk
        return entries.tobytes()

    def task(self, path: str, covers: tuple[Cover, ...], witnesses: tuple[Witness | None, ...]) -> Task:
        """The task that writes this object at `path` from the covers, and witnesses, of its states."""
        start, run, region = self.data_start, self.grid.run_bytes(self.number), self.grid.region(self.number)
        sections = tuple(
            Section(start + i * run, region, cover, witness)
            for i, (cover, witness) in enumerate(zip(covers, witnesses, strict=True))
        )
        return Task(path, self.size, self, sections)


def framed(entries: dict[str, object], *, align: int) -> bytes:
    """A safetensors header: its length as u64 LE, the JSON, and spaces up to a multiple of `align`."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // align) * align - 8
    return struct.pack("<Q", padded) + text.ljust(padded)
