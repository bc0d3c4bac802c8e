"""The converter of the universal form itself: reads what it wrote, from the manifest alone, and lays catalogs out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog, Checksum
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.format import parse
from ucp.format.checksums import Checksums, listed, read_file
from ucp.format.documents import Json, parsed, root_digest, zarr_documents
from ucp.format.grid import SHARD_BYTES
from ucp.format.leaves import LeafReader
from ucp.format.manifest import FAMILY, Manifest, read_manifest
from ucp.format.pool import with_shared
from ucp.format.records import ROOT, File
from ucp.format.state import Blob, Decoder
from ucp.format.target import UniversalTarget, make_target
from ucp.layout import Shape
from ucp.plan import Fragment, Key
from ucp.store import Store

_GLANCE = 64 << 10


@dataclass(frozen=True, slots=True)
class UniversalConverter:
    """Reads and writes family ``universal``."""

    family: str = FAMILY
    shares: bool = True

    def files(self, store: Store) -> tuple[str, ...]:
        """The root names all others."""
        return (ROOT,)

    def detect(self, store: Store) -> bool:
        """Whether there is a root group with a manifest; without a root nothing is a checkpoint."""
        if not store.exists(ROOT):
            return False
        return b'"ucp"' in store.read(ROOT, 0, min(store.entry(ROOT).size, _GLANCE))

    def read(self, store: Store, **options: Any) -> Catalog:
        """The catalog: root, training state and one listing are read, no object is opened.

        NotFoundError if there is no root, FitError for a newer major version, CorruptError for whatever is damaged,
        missing, shorter than it should be, or contradicts itself.
        """
        if options:
            raise UsageError(f"a universal checkpoint is read without options, not {' '.join(sorted(options))}")
        attributes, manifest = read_root(store)
        store = with_shared(store, _data_objects(manifest))
        where = f"{store.url}/{ROOT}"
        decoder, state = _read_state(store, manifest)
        fragments: dict[Key, tuple[Fragment, ...]] = {}
        for record in manifest.records:
            for array in record.arrays:
                fragments.update(array.fragments(record.tensor.name))
        return Catalog(
            url=store.url,
            source=manifest.source,
            tensors={record.tensor.name: record.tensor for record in manifest.records},
            fragments=fragments,
            step=manifest.step,
            ties=manifest.ties,
            program=manifest.program,
            param_groups=manifest.param_groups(decoder, where=where),
            state={name: decoder.decode(value, where=name) for name, value in state.items()},
            checksums=Checksums(store, manifest),
            objects=_objects(store, manifest),
            notes=manifest.notes,
            options={FAMILY: manifest.kept(attributes)},
        )

    def mounted(self, store: Store, catalog: Catalog) -> Store:
        """`store`, where `catalog` lies, with what that shares with other checkpoints of its run."""
        return with_shared(store, catalog.objects)

    def target(
        self, catalog: Catalog, store: Store, *, shard_bytes: int | str = SHARD_BYTES, **options: Any
    ) -> UniversalTarget:
        """Lay `catalog` out in objects of about `shard_bytes` bytes, a number or text such as ``256MiB``.

        UsageError for any other option.
        """
        if options:
            raise UsageError(
                f"unknown options for a universal target: {' '.join(sorted(options))}", hint="known: shard_bytes"
            )
        return make_target(catalog, store, shard_bytes=_amount("shard_bytes", shard_bytes))


def _amount(name: str, value: object) -> int:
    """A number of bytes; text may end in a decimal or binary unit (``500MB``, ``256 MiB``)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"(\d{1,18}) ?(?:([KMGT])(i?))?B?", value, re.IGNORECASE) if isinstance(value, str) else None
    if found is None:
        raise UsageError(f"{name}: {value!r} is no number of bytes", hint=f"for example {name}=256MiB")
    power = " KMGT".index((found[2] or " ").upper())
    return int(found[1]) * int((1024 if found[3] else 1000) ** power)


def read_root(store: Store) -> tuple[Json, Manifest]:
    """Attributes of the root group, and its manifest, checked against its digest and its consolidated metadata."""
    where = f"{store.url}/{ROOT}"
    root = parsed(store.read(ROOT), where=where)
    attributes = parse.member(root, "attributes", dict, where)
    if "ucp" not in attributes:
        raise NotFoundError(f"{where}: a Zarr group, but no universal checkpoint")
    raw = parse.member(attributes, "ucp", dict, where)
    parse.check_version(raw, where=where)
    if parse.natural(raw, "crc32c", where) != root_digest(root):
        raise CorruptError(
            f"{where}: damaged, or changed after it was written", hint="restore this file from another copy"
        )
    manifest = read_manifest(raw, where=where)
    _check_files(manifest, where)
    return attributes, manifest


def _check_files(manifest: Manifest, where: str) -> None:
    """CorruptError if a small file that every checkpoint has is not listed."""
    places = manifest.places
    folders = zarr_documents(manifest.records, places)
    needed = {places.state, places.digests, *(f"{folder}/{ROOT}" for folder in folders)}
    missing = sorted(needed - manifest.files.keys())
    if missing:
        raise CorruptError(f"{where}: does not list {missing[0]}")


def _read_state(store: Store, manifest: Manifest) -> tuple[Decoder, Json]:
    places = manifest.places
    where = f"{store.url}/{places.state}"
    doc = parsed(read_file(store, manifest.files[places.state]), where=where)
    file = manifest.files.get(places.blobs, File(places.blobs, 0, 0))
    blobs = {name: _blob(row, file, where) for name, row in parse.members(doc, "blobs", dict, where)}
    reader = LeafReader(store, [Checksum(file.path, 0, file.size, "crc32c", file.crc32c)])
    return Decoder(blobs, reader), parse.member(doc, "state", dict, where)


def _blob(row: Json, file: File, where: str) -> Blob:
    shape: Shape = parse.shape(row, "shape", where)
    blob = Blob(parse.dtype(row, where), shape, parse.natural(row, "offset", where), file.path)
    if blob.offset + blob.extent.nbytes > file.size:
        raise CorruptError(f"{where}: a tensor reaches past the end of {file.path}", hint="do not trust this file")
    return blob


def _objects(store: Store, manifest: Manifest) -> dict[str, tuple[int, str]]:
    """Size and fingerprint of every object; CorruptError if one is missing or has another size."""
    files = {path: file.size for path, file in manifest.files.items()}
    return listed(store, files | _data_objects(manifest), root=ROOT)


def _data_objects(manifest: Manifest) -> dict[str, int]:
    """Size of every object of an array, by path."""
    arrays = [array for record in manifest.records for array in record.arrays]
    return {array.object(number): shard.size for array in arrays for number, shard in enumerate(array.shards)}


CONVERTER = UniversalConverter()
