"""A checkpoint that shares objects with others of its run, seen as one that has them all in its own folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from crc32c import crc32c

from ucp.errors import NotFoundError, UsageError
from ucp.format import native_manifest
from ucp.format.documents import Json, canonical, compact, parsed, root_document, zarr_documents
from ucp.format.pool import name_in, path_of
from ucp.format.records import ROOT
from ucp.format.universal import read_root
from ucp.store import Buffer, Entry, Store, Writer


class Whole(Store):
    """`store` read only, with objects `made` of bytes, and others under the paths of `moved`, which tells the old ones.

    What is moved is not there under its old path.
    """

    def __init__(self, store: Store, made: Mapping[str, bytes], moved: Mapping[str, str]) -> None:
        self.store, self.made, self.moved = store, made, moved
        self._gone = {*moved.values()}
        self.url, self.parallel, self.lists = store.url, store.parallel, store.lists

    def entry(self, path: str) -> Entry:
        if path in self.made:
            # An object that is there in another form has its fingerprint, so that a change of it shows.
            mark = self.store.entry(path).fingerprint if self.store.exists(path) else f"{crc32c(self.made[path]):08x}"
            return Entry(path, len(self.made[path]), mark)
        return replace(self.store.entry(self._old(path)), path=path)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        new = {old: path for path, old in self.moved.items()}
        found = [replace(entry, path=new.get(entry.path, entry.path)) for entry in self.store.entries()]
        paths = {entry.path: entry for entry in found if entry.path not in self.made}
        paths |= {path: self.entry(path) for path in self.made}
        yield from (paths[path] for path in sorted(paths) if path.startswith(prefix))

    def children(self, path: str = "") -> list[str]:
        top = f"{path}/" if path else ""
        below = (entry.path[len(top) :].partition("/") for entry in self.entries(top))
        return sorted({f"{name}{sign}" for name, sign, _ in below})

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        if path in self.made:
            memoryview(buffer).cast("B")[:] = self.made[path][offset : offset + len(memoryview(buffer).cast("B"))]
        else:
            self.store.read_into(self._old(path), offset, buffer)

    def create(self, path: str, size: int) -> Writer:
        raise self._read_only()

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        raise self._read_only()

    def delete(self, path: str) -> None:
        raise self._read_only()

    def child(self, path: str) -> Store:
        return self.store.child(path)

    def overlaps(self, other: Store) -> bool:
        return self.store.overlaps(other)

    def _old(self, path: str) -> str:
        if path in self._gone:
            raise NotFoundError(f"{self.url}/{path}: no such object")
        return self.moved.get(path, path)

    def _read_only(self) -> UsageError:
        return UsageError(f"{self.url}: is only read")


def materialised(family: str, store: Store) -> Whole:
    """The checkpoint in `store`, of the universal or the native form, as one that shares nothing."""
    return _native(store) if family == native_manifest.FAMILY else _universal(store)


def _native(store: Store) -> Whole:
    doc = parsed(store.read(native_manifest.ROOT), where=store.url)
    names = [row["shared"] for row in doc["shards"] if "shared" in row]
    moved = {_shard(name): path_of(name) for name in names}
    rows = [{"path": _shard(row["shared"]), **row} if "shared" in row else row for row in doc["shards"]]
    shards = [{key: value for key, value in row.items() if key != "shared"} for row in rows]
    doc = {**doc, "version": "1.0", "shards": shards}
    doc = {key: value for key, value in doc.items() if key != "crc32c"}
    return Whole(store, {native_manifest.ROOT: compact({**doc, "crc32c": crc32c(canonical(doc))})}, moved)


def _shard(name: str) -> str:
    return f"shards/shared-{name}.safetensors"


def _universal(store: Store) -> Whole:
    attributes, manifest = read_root(store)
    moved: dict[str, str] = {}
    records = []
    for record in manifest.records:
        arrays = []
        for array in record.arrays:
            own = replace(array, shards=tuple(replace(shard, shared="") for shard in array.shards))
            places = ((own.object(number), array.object(number)) for number in range(len(array.shards)))
            moved |= {new: old for new, old in places if name_in(old) is not None}
            arrays.append(own)
        records.append(replace(record, arrays=tuple(arrays)))
    documents = zarr_documents(records, manifest.places)
    small = {f"{folder}/{ROOT}": compact(document) for folder, document in documents.items()}
    made = {path: data for path, data in small.items() if path not in manifest.files}
    raw: Json = {
        **manifest.raw,
        "version": "1.0",
        "tensors": [_unshared(row) for row in manifest.raw["tensors"]],
        "files": [
            *({"path": path, "size": len(data), "crc32c": crc32c(data)} for path, data in made.items()),
            *manifest.raw["files"],
        ],
    }
    raw.pop("crc32c")
    others = {key: value for key, value in attributes.items() if key != "ucp"}
    return Whole(store, {**made, ROOT: compact(root_document(raw, documents, others))}, moved)


def _unshared(tensor: dict[str, Any]) -> Json:
    def rows(array: Json) -> list[Json]:
        return [{key: value for key, value in row.items() if key != "shared"} for row in array["objects"]]

    return {**tensor, "arrays": [{**array, "objects": rows(array)} for array in tensor["arrays"]]}


__all__ = ["Whole", "materialised"]
