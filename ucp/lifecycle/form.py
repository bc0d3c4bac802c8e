"""What a manifest of ours says of every object, whether or not these are there: sizes, digests, places of tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from ucp.catalog import Checksum
from ucp.errors import ContentError, NotFoundError
from ucp.format import native_manifest
from ucp.format.checksums import Checksums
from ucp.format.documents import compact, zarr_documents
from ucp.format.manifest import Manifest
from ucp.format.native_shard import Piece, shard_header
from ucp.format.records import ROOT as UNIVERSAL_ROOT
from ucp.format.records import File
from ucp.format.shard import ShardFrame
from ucp.format.universal import read_root
from ucp.lifecycle.contents import OWN
from ucp.plan import Digests, Fragment, Key, TensorSpec
from ucp.run.crc import crc
from ucp.store import Store

Literal = tuple[str, int, bytes]
"""Path, offset and bytes of a part of an object that follows from the manifest and the digests alone."""

_RANK = re.compile(r"shards/rank-(\d+)-")


@dataclass(frozen=True)
class Form:
    """A checkpoint of ours as its `root` describes it.

    `id` is the checkpoint's own. `files` are the small objects, digested as a whole; `roles` their names whatever the
    generation, and `made` the bytes of those that follow from the root. `digests` is the small object, if any, that is
    needed to know the `checksums`; `gathered` puts it together from its parts in other objects of a store. `sizes` are
    those of all other objects.
    """

    family: str
    root: bytes
    id: str
    files: Mapping[str, File]
    roles: Mapping[str, str]
    made: Mapping[str, bytes]
    digests: str | None
    sizes: Mapping[str, int]
    specs: Mapping[Key, TensorSpec]
    fragments: Mapping[Key, tuple[Fragment, ...]]
    checksums: Callable[[bytes], Sequence[Checksum]]
    literals: Callable[[Sequence[Checksum]], Iterator[Literal]] = field(repr=False)
    gathered: Callable[[Store], bytes | None] = field(default_factory=lambda: lambda _: None, repr=False)

    @property
    def root_path(self) -> str:
        """Where the root lies."""
        return OWN[self.family]


def form_at(store: Store) -> Form:
    """What the root in `store` describes; CorruptError, FitError or NotFoundError if there is no sound one."""
    family = "native" if store.exists(OWN["native"]) else "universal"
    return form_of(family, store.read(OWN[family]), where=store.url)


def form_of(family: str, root: bytes, *, where: str) -> Form:
    """What the bytes of a root describe; CorruptError or FitError if these are not sound."""
    return _native(root, where) if family == "native" else _universal(root, where)


@dataclass(frozen=True, slots=True)
class _Only:
    """As much of a store as readers of one object in memory need."""

    url: str
    data: bytes

    def read(self, path: str) -> bytes:
        return self.data


def _universal(root: bytes, where: str) -> Form:
    _, manifest = read_root(cast("Store", _Only(where, root)))
    arrays = [(record, array) for record in manifest.records for array in record.arrays]
    folders = zarr_documents(manifest.records, manifest.places)
    return Form(
        "universal",
        root,
        str(manifest.raw.get("id", "")),
        manifest.files,
        {path: manifest.places.plain(path) for path in manifest.files},
        {f"{folder}/{UNIVERSAL_ROOT}": compact(document) for folder, document in folders.items()},
        manifest.places.digests,
        {array.object(number): shard.size for _, array in arrays for number, shard in enumerate(array.shards)},
        {Key(record.tensor.name, s): spec for record in manifest.records for s, spec in record.tensor.states.items()},
        {key: held for record, array in arrays for key, held in array.fragments(record.tensor.name)},
        lambda data: Checksums(cast("Store", _Only(where, data)), manifest),
        lambda checksums: _frames(manifest, checksums),
        lambda store: _gathered(manifest, store),
    )


def _gathered(manifest: Manifest, store: Store) -> bytes | None:
    """The digests of all blocks from where each object keeps those of its own, or None where one of these is damaged.

    They lie at the start of ``__ucp_index__`` (spec/universal-format.md, "Objects").
    """
    found = []
    for record in manifest.records:
        for array in record.arrays:
            for number, shard in enumerate(array.shards):
                frame = ShardFrame(record.tensor.name, array.states, array.grid, number, manifest.block_bytes)
                try:
                    data = store.read(
                        array.object(number), frame.index_start, 4 * array.grid.blocks(number, manifest.block_bytes)
                    )
                except (ContentError, NotFoundError):
                    return None
                if crc("crc32c", data) != shard.blocks:
                    return None
                found.append(data)
    return b"".join(found)


def _frames(manifest: Manifest, checksums: Sequence[Checksum]) -> Iterator[Literal]:
    """What lies around the data of each object."""
    values: dict[str, list[int]] = defaultdict(list)
    for checksum in checksums:
        values[checksum.object].append(checksum.value)
    for record in manifest.records:
        for array in record.arrays:
            for number in range(array.grid.count):
                path = array.object(number)
                frame = ShardFrame(record.tensor.name, array.states, array.grid, number, manifest.block_bytes)
                yield path, 0, frame.header
                if len(blocks := values[path][1:-1]) == array.grid.blocks(number, manifest.block_bytes):
                    yield path, *frame.suffix(Digests(tuple(blocks), ()))


def _native(root: bytes, where: str) -> Form:
    manifest = native_manifest.loads(root, where=where)
    specs = {Key(tensor.name, s): spec for tensor in manifest.tensors for s, spec in tensor.states.items()}
    fragments = {key: tuple(part.fragment(specs[key].dtype) for part in parts) for key, parts in manifest.parts.items()}
    return Form(
        "native",
        root,
        manifest.id,
        manifest.files,
        {path: re.sub(r"-[A-Za-z0-9]{1,32}(?=\.safetensors$)", "", path) for path in manifest.files},
        {},
        None,
        {shard.path: shard.size for shard in manifest.shards},
        specs,
        fragments,
        lambda _: tuple(manifest.checksums()),
        lambda _: _headers(fragments, specs),
    )


def _headers(fragments: Mapping[Key, Sequence[Fragment]], specs: Mapping[Key, TensorSpec]) -> Iterator[Literal]:
    """The headers of shards, as savers of this version write them."""
    held: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    for key, parts in fragments.items():
        for part in parts:
            piece = Piece(key, specs[key].dtype, part.region)  # type: ignore[arg-type]  # of this form, all are boxes
            held[part.extent.object].append((part.extent.offset, piece))
    for path, pieces in held.items():
        rank = _RANK.match(path)  # none in what is shared
        yield path, 0, shard_header(rank and int(rank[1]), [piece for _, piece in sorted(pieces, key=lambda p: p[0])])


__all__ = ["Form", "Literal", "form_at", "form_of"]
