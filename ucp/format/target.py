"""A catalog laid out in the universal form: one task per object, then the small objects, the root last."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from crc32c import crc32c

from ucp.catalog import Catalog, Tensor
from ucp.errors import FitError
from ucp.format.documents import compact, root_document, zarr_documents
from ucp.format.grid import SHARD_BYTES, Grid
from ucp.format.leaves import LeafReader
from ucp.format.manifest import FAMILY, encode_groups, keeps, make_manifest
from ucp.format.names import component
from ucp.format.records import PLAIN, ROOT, Array, File, Places, Record, Shard, is_ours
from ucp.format.shard import INDEX, ShardFrame
from ucp.format.state import Encoder
from ucp.plan import Digests, Task, TensorSpec
from ucp.store import Store


@dataclass(frozen=True)
class UniversalTarget:
    """A universal checkpoint to be written; `records` say how, but do not know the digests yet."""

    catalog: Catalog
    store: Store
    records: tuple[Record, ...]
    tasks: tuple[Task, ...]
    family: str = FAMILY
    root: str = ROOT
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    shard_bytes: int = SHARD_BYTES
    places: Places = PLAIN
    shared: Callable[[], Mapping[str, str]] = dict

    def relocated(self, generation: str) -> UniversalTarget:
        """The same checkpoint under names of its own, beside another one that it is to replace."""
        return replace(
            make_target(self.catalog, self.store, shard_bytes=self.shard_bytes, places=Places(generation)),
            shared=self.shared,
        )

    def sharing(self, shared: Callable[[], Mapping[str, str]]) -> UniversalTarget:
        """The same checkpoint, whose objects `shared` tells, once they are written, which lie in the pool: by path."""
        return replace(self, shared=shared)

    def is_ours(self, path: str) -> bool:
        """Whether an object of that name may be part of a checkpoint of this family, of any generation."""
        return is_ours(path)

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """Zarr metadata, training state and block digests, then the root with the manifest."""
        shared = self.shared()
        records = [_digested(record, digests, shared) for record in self.records]
        documents, places = zarr_documents(records, self.places), self.places
        encoder = Encoder(LeafReader(self.store, self.catalog.checksums))
        blocks = b"".join(_blocks(digests[path]) for record in self.records for _, path in _objects(record))
        state = {name: encoder.encode(tree, where=name) for name, tree in self.catalog.state.items()}
        groups = encode_groups(self.catalog, encoder)
        blobs, table = encoder.blobs()
        small = {f"{folder}/{ROOT}": compact(document) for folder, document in documents.items()}
        if blobs:
            small[places.blobs] = blobs
        small[places.state] = compact({"blobs": table, "state": state})
        small[places.digests] = blocks
        files = [File(path, len(data), crc32c(data)) for path, data in small.items()]
        yield from small.items()
        manifest = make_manifest(self.catalog, records, files, groups=groups, digests=blocks, places=places)
        yield ROOT, compact(root_document(manifest, documents, keeps(self.catalog).attributes))


def make_target(
    catalog: Catalog, store: Store, *, shard_bytes: int = SHARD_BYTES, places: Places = PLAIN
) -> UniversalTarget:
    """Lay `catalog`, which lies in `store`, out in objects of about `shard_bytes` data bytes."""
    extra = keeps(catalog).tensors
    records = tuple(
        Record(tensor, tuple(_arrays(tensor, shard_bytes, places.tensors)), extra.get(name, {}))
        for name, tensor in catalog.tensors.items()
    )
    tasks = tuple(_task(catalog, frame, path) for record in records for frame, path in _objects(record))
    return UniversalTarget(catalog, store, records, tasks, shard_bytes=shard_bytes, places=places)


def _arrays(tensor: Tensor, shard_bytes: int, place: str) -> Iterator[Array]:
    """One array per shape and dtype, the one with ``value`` first."""
    groups: dict[TensorSpec, list[str]] = {}
    for state in sorted(tensor.states, key=lambda state: state != "value"):
        if state in ("", INDEX, "__metadata__"):
            raise FitError(f"{tensor.name}: a state cannot be named {state!r} in the universal form")
        groups.setdefault(tensor.states[state], []).append(state)
    for number, (spec, states) in enumerate(groups.items()):
        folder = component(tensor.name, states[0] if number else None)
        grid = Grid.choose(len(states), spec.shape, spec.dtype, shard_bytes=shard_bytes)
        yield Array(f"{place}/{folder}", tuple(states), grid)


def _objects(record: Record) -> Iterator[tuple[ShardFrame, str]]:
    """Frame and path of every object of a tensor, in manifest order."""
    for array in record.arrays:
        for number in range(array.grid.count):
            yield ShardFrame(record.tensor.name, array.states, array.grid, number), array.object(number)


def _task(catalog: Catalog, frame: ShardFrame, path: str) -> Task:
    covers = tuple(catalog.cover(frame.name, state) for state in frame.states)
    witnesses = tuple(catalog.witness(frame.name) if state == "value" else None for state in frame.states)
    return frame.task(path, covers, witnesses)


def _digested(record: Record, digests: Mapping[str, Digests], shared: Mapping[str, str]) -> Record:
    """The record with its objects, whose digests are known now, and of which some are `shared` under a name."""
    shards = {
        path: replace(_shard(frame, digests[path]), shared=shared.get(path, "")) for frame, path in _objects(record)
    }
    arrays = (
        replace(array, shards=tuple(shards[array.object(number)] for number in range(array.grid.count)))
        for array in record.arrays
    )
    return replace(record, arrays=tuple(arrays))


def _shard(frame: ShardFrame, digests: Digests) -> Shard:
    header, (start, suffix) = frame.header, frame.suffix(digests)
    return Shard(start + len(suffix), len(header), crc32c(header), crc32c(suffix), crc32c(_blocks(digests)))


def _blocks(digests: Digests) -> bytes:
    return struct.pack(f"<{len(digests.crc32c)}I", *digests.crc32c)
