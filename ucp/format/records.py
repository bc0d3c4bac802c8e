"""What the manifest says about arrays, objects and small files: frozen records, as pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.catalog import Tensor
from ucp.format.grid import Grid
from ucp.plan import Extent, Fragment, Key

ROOT = "zarr.json"
"""The root object: what makes a folder a checkpoint, put last."""

TENSORS = "tensors"
"""The Zarr group that holds the arrays."""

STATE = "state.json"
BLOBS = "state/blobs.safetensors"
DIGESTS = "digests.bin"
VERSION = (1, 0)
"""Major and minor version of the format."""


@dataclass(frozen=True, slots=True)
class File:
    """A small object, digested as a whole."""

    path: str
    size: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Shard:
    """An object of an array: its size, the byte where its first state starts, and digests of what is not data.

    These are the crc32c of the bytes before (`header`), of those after (`index`), and of the list of its block digests
    as u32 LE (`blocks`).
    """

    size: int
    data: int
    header: int
    index: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Array:
    """One Zarr array at folder `path`: `states` of one shape and dtype, cut as `grid` says, object by object."""

    path: str
    states: tuple[str, ...]
    grid: Grid
    shards: tuple[Shard, ...] = ()

    def object(self, number: int) -> str:
        """Path of object `number`."""
        return f"{self.path}/{self.grid.key(number)}"

    def fragments(self, name: str) -> Iterator[tuple[Key, tuple[Fragment, ...]]]:
        """Where each state of tensor `name` lies: one flat range per object."""
        for i, state in enumerate(self.states):
            yield Key(name, state), tuple(self._fragment(number, i) for number in range(self.grid.count))

    def _fragment(self, number: int, state: int) -> Fragment:
        region = self.grid.region(number)
        offset = self.shards[number].data + state * self.grid.run_bytes(number)
        return Fragment(region, Extent.contiguous(self.object(number), offset, (region.length,), self.grid.dtype))


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor of the manifest with its arrays; `extra` are members of other versions, kept as they are."""

    tensor: Tensor
    arrays: tuple[Array, ...]
    extra: Mapping[str, object]
