"""What the manifest says about arrays, objects and small files: frozen records, as pure data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.catalog import Tensor
from ucp.format.grid import Grid
from ucp.format.pool import path_of
from ucp.plan import Extent, Fragment, Key

ROOT = "zarr.json"
"""The root object: what makes a folder a checkpoint, put last."""

VERSION = (1, 1)
"""Newest major and minor version of the format that is known here."""

_OURS = re.compile(
    r"(tensors(\.\w{1,32})?|state)/.*|state(\.\w{1,32})?\.json|digests(\.\w{1,32})?\.bin|ucp-conversion(\.\w{1,32})?\.json"
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything but the root lies. What replaces a checkpoint has a `generation`, and so names of its own."""

    generation: str = ""

    @property
    def tensors(self) -> str:
        """The Zarr group that holds the arrays."""
        return self._named("tensors", "")

    @property
    def state(self) -> str:
        """The training state."""
        return self._named("state", ".json")

    @property
    def blobs(self) -> str:
        """Tensors of the training state."""
        return self._named("state/blobs", ".safetensors")

    @property
    def digests(self) -> str:
        """Digests of blocks."""
        return self._named("digests", ".bin")

    def _named(self, stem: str, ending: str) -> str:
        return f"{stem}.{self.generation}{ending}" if self.generation else f"{stem}{ending}"

    def plain(self, path: str) -> str:
        """`path` as it would be without a generation."""
        return path.replace(f".{self.generation}", "", 1) if self.generation else path


PLAIN = Places()
"""Of a checkpoint that replaces none."""


def is_ours(path: str) -> bool:
    """Whether an object of that name may be part of a universal checkpoint of any generation, its root left out."""
    return _OURS.fullmatch(path) is not None


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
    as u32 LE (`blocks`). `shared` is its name where it lies in the pool of the run (`ucp.format.pool`).
    """

    size: int
    data: int
    header: int
    index: int
    blocks: int
    shared: str = ""


@dataclass(frozen=True, slots=True)
class Array:
    """One Zarr array at folder `path`: `states` of one shape and dtype, cut as `grid` says, object by object."""

    path: str
    states: tuple[str, ...]
    grid: Grid
    shards: tuple[Shard, ...] = ()

    def object(self, number: int) -> str:
        """Path of object `number`."""
        if self.shards and self.shards[number].shared:
            return path_of(self.shards[number].shared)
        return f"{self.path}/{self.grid.key(number)}"

    @property
    def shares(self) -> bool:
        """Whether an object of it lies in the pool: Zarr would not find it, and take zeros for it."""
        return any(shard.shared for shard in self.shards)

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
