"""The digests of a universal checkpoint as checksums of a catalog, read only when somebody wants them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from crc32c import crc32c

from ucp.catalog import Checksum
from ucp.errors import CorruptError, NotFoundError
from ucp.format.manifest import Manifest
from ucp.format.pool import name_in
from ucp.format.records import Array, File
from ucp.store import Store
from ucp.store.several import entries_at


def read_file(store: Store, file: File) -> bytes:
    """The bytes of a small file; CorruptError if they are not what the manifest says."""
    data = store.read(file.path)
    if len(data) != file.size or crc32c(data) != file.crc32c:
        raise CorruptError(
            f"{store.url}/{file.path}: {len(data)} bytes that are not those the manifest digested",
            hint="the file is damaged: restore it from another copy",
        )
    return data


def listed(store: Store, wanted: Mapping[str, int], *, root: str) -> dict[str, tuple[int, str]]:
    """Size and fingerprint of the `root` and of every object in `wanted`, a map from path to size.

    One listing where the store lists; CorruptError if one is missing or has another size, NotFoundError if the root is
    gone, which was there when it was read.
    """
    found = {entry.path: entry for entry in (store.entries() if store.lists else entries_at(store, [root, *wanted]))}
    if root not in found:
        raise NotFoundError(
            f"{store.url}/{root}: was deleted while it was read", hint="its checkpoint is being deleted"
        )
    for path, size in wanted.items():
        if path not in found:
            hint = (
                "`ucp cp` copies a checkpoint with what it shares" if name_in(path) else "restore it from another copy"
            )
            raise CorruptError(f"{store.url}/{path}: missing", hint=hint)
        if found[path].size != size:
            raise CorruptError(
                f"{store.url}/{path}: has {found[path].size} bytes, not {size}", hint="restore it from another copy"
            )
    return {path: (found[path].size, found[path].fingerprint) for path in (root, *wanted)}


@dataclass(eq=False)
class Checksums(Sequence[Checksum]):
    """One checksum per digest block, one per run of bytes around the data of an object, one per small file.

    The block digests are one small object, which is read at the first use.
    """

    store: Store
    manifest: Manifest
    _all: list[Checksum] = field(default_factory=list)

    @overload
    def __getitem__(self, index: int) -> Checksum: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Checksum]: ...
    def __getitem__(self, index: int | slice) -> Checksum | Sequence[Checksum]:
        return self._loaded()[index]

    def __len__(self) -> int:
        return len(self._loaded())

    def __iter__(self) -> Iterator[Checksum]:
        return iter(self._loaded())

    def _loaded(self) -> list[Checksum]:
        if not self._all:
            self._all = list(self._load())
        return self._all

    def _load(self) -> Iterator[Checksum]:
        digests = self.manifest.places.digests
        data = read_file(self.store, self.manifest.files[digests])
        at, block_bytes = 0, self.manifest.block_bytes
        for array in (array for record in self.manifest.records for array in record.arrays):
            for number in range(array.grid.count):
                end = at + 4 * array.grid.blocks(number, block_bytes)
                yield from self._of_object(array, number, data[at:end])
                at = end
        if at != len(data):
            raise CorruptError(f"{self.store.url}/{digests}: {len(data)} bytes where {at} were expected")
        for file in self.manifest.files.values():
            yield Checksum(file.path, 0, file.size, "crc32c", file.crc32c)

    def _of_object(self, array: Array, number: int, blocks: bytes) -> Iterator[Checksum]:
        shard, path = array.shards[number], array.object(number)
        if len(blocks) != 4 * array.grid.blocks(number, self.manifest.block_bytes) or crc32c(blocks) != shard.blocks:
            raise CorruptError(
                f"{self.store.url}/{self.manifest.places.digests}: the digests of {path} are not those of the manifest"
            )
        yield Checksum(path, 0, shard.data, "crc32c", shard.header)
        values = struct.unpack(f"<{len(blocks) // 4}I", blocks)
        spans = _block_spans(array, number, shard.data, self.manifest.block_bytes)
        for (start, stop), value in zip(spans, values, strict=True):
            yield Checksum(path, start, stop - start, "crc32c", value)
        index = array.grid.index_bytes(number, self.manifest.block_bytes)
        yield Checksum(path, shard.size - index, index, "crc32c", shard.index)


def _block_spans(array: Array, number: int, start: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Absolute byte ranges of the digest blocks of an object: each state's run, cut every `block_bytes`."""
    for _ in array.states:
        end = start + array.grid.run_bytes(number)
        for at in range(start, end, block_bytes):
            yield at, min(at + block_bytes, end)
        start = end
