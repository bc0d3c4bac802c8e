"""What checkpoints share: read from their root objects alone."""

from __future__ import annotations

from collections.abc import Iterator

from crc32c import crc32c

from ucp.errors import CorruptError, NotFoundError
from ucp.format import native_manifest, parse, records
from ucp.format.documents import Json, canonical, parsed, root_digest
from ucp.format.manifest import read_manifest
from ucp.format.pool import shared_name
from ucp.share.settled import read_settled
from ucp.store import Store

ROOTS = (native_manifest.ROOT, records.ROOT)
"""The objects of which each makes a folder a checkpoint that may share."""


def shared_by(folder: Store) -> dict[str, int] | None:
    """Names and sizes of the objects that the checkpoint in `folder` shares; None if there is none.

    CorruptError for a root that is damaged, FitError for one of a newer major version: what it needs is not known then.
    """
    found: dict[str, int] | None = None
    for root in ROOTS:
        try:
            data, _ = read_settled(folder, root)
        except NotFoundError:
            continue
        held = shared_in(root, data, where=f"{folder.url}/{root}")
        if held is not None:
            found = (found or {}) | held
    return found


def shared_in(root: str, data: bytes, *, where: str) -> dict[str, int] | None:
    """Names and sizes of what the root object of that name, with these bytes, shares; None for a foreign Zarr group."""
    doc = parsed(data, where=where)
    rows = _native_rows(doc, where) if root == native_manifest.ROOT else _universal_rows(doc, where)
    if rows is None:
        return None
    named = ((shared_name(row, where), parse.natural(row, "size", where)) for row in rows)
    return {name: size for name, size in named if name is not None}


def placed_by(data: bytes, *, where: str) -> dict[str, tuple[str, int]]:
    """Name and size of the objects that a universal checkpoint shares, by the path that each would have in its folder.

    Nothing for a foreign Zarr group.
    """
    doc = parsed(data, where=where)
    if _universal_rows(doc, where) is None:
        return {}
    arrays = (a for record in read_manifest(doc["attributes"]["ucp"], where=where).records for a in record.arrays)
    rows = ((f"{a.path}/{a.grid.key(number)}", shard) for a in arrays for number, shard in enumerate(a.shards))
    return {path: (shard.shared, shard.size) for path, shard in rows if shard.shared}


def _native_rows(doc: Json, where: str) -> Iterator[Json]:
    native_manifest.check_version(doc, where)
    without = {key: value for key, value in doc.items() if key != "crc32c"}
    _check(parse.natural(doc, "crc32c", where) == crc32c(canonical(without)), where)
    return iter(parse.items(doc, "shards", dict, where))


def _universal_rows(doc: Json, where: str) -> Iterator[Json] | None:
    attributes = parse.member(doc, "attributes", dict, where) if "attributes" in doc else {}
    if "ucp" not in attributes:
        return None
    manifest = parse.member(attributes, "ucp", dict, where)
    parse.check_version(manifest, where=where)
    _check(parse.natural(manifest, "crc32c", where) == root_digest(doc), where)
    return (
        row
        for tensor in parse.items(manifest, "tensors", dict, where)
        for array in parse.items(tensor, "arrays", dict, where)
        for row in parse.items(array, "objects", dict, where)
    )


def _check(same: bool, where: str) -> None:
    if not same:
        raise CorruptError(f"{where}: damaged, or changed after it was written", hint="restore it from another copy")


__all__ = ["ROOTS", "placed_by", "shared_by", "shared_in"]
