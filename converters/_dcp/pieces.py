"""Tensors put together from the chunks that ``.metadata`` lists, with proof that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from ucp.catalog import Checksum
from ucp.errors import ConflictError, CorruptError, FitError
from ucp.layout import Box, Shape
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Cover, Fragment, Key, TensorSpec
from ucp.store import Store

from .contents import Contents, Held, Path
from .items import Items
from .metadata import METADATA, Chunk, Entry, Metadata

_AGAIN = "the .metadata is damaged or does not belong to these files: copy the whole folder again"


def read_contents(store: Store, metadata: Metadata, *, path: str = METADATA) -> Contents:
    """Everything that `metadata`, which was read from `path`, lists, each item looked at.

    ConflictError where ranks saved one tensor in different shapes; CorruptError for chunks that overlap, leave a hole
    or reach outside, for items that overlap in their file and for those that are not what the metadata says;
    NotFoundError for missing files, FitError for dtypes unknown to ucp.
    """
    where = f"{store.url}/{path}"
    check_places(where, metadata)
    pieces = {key: distinct_chunks(where, key, entry) for key, entry in metadata.tensors.items()}
    kept = [chunk.stored for chunks in pieces.values() for chunk in chunks if chunk.stored is not None]
    items = Items(store, [*kept, *metadata.blobs.values()])
    checksums: list[Checksum] = []
    tensors = {key: _held(store, items, key, metadata.tensors[key], pieces[key], checksums) for key in pieces}
    values = {key: items.blob(stored) for key, stored in metadata.blobs.items()}
    for stored in metadata.blobs.values():
        checksums += items.checksums(stored)
    paths = dict(metadata.planner or {})
    _check_paths(where, paths)
    known = {key: paths.get(key, (key,)) for key in [*paths, *metadata.tensors, *metadata.blobs]}
    paths = {key: path for key, path in known.items() if key in tensors or key in values}
    return Contents(
        store.url,
        tensors,
        values,
        paths,
        ordered=metadata.planner is not None,
        checksums=tuple(checksums),
        entries=tuple(items.entries.values()),
    )


def _check_paths(where: str, paths: Mapping[str, Path]) -> None:
    """CorruptError for a path that does not spell its key (torch/distributed/checkpoint/_nested_dict.py)."""
    for key, path in paths.items():
        if ".".join(map(str, path)) != key:
            raise CorruptError(f"{where}: planner_data says that {key} comes from {list(path)!r:.80}", hint=_AGAIN)


def assemble(
    where: str, key: str, spec: TensorSpec, fragments: tuple[Fragment, ...], *, small: bytes | None = None
) -> Held:
    """A tensor of `fragments`; CorruptError if they overlap, leave a hole or reach outside."""
    try:
        Cover.of(Key(key, "value"), spec, fragments)
    except FitError as error:
        raise CorruptError(f"{where}: {error.message}", hint=_AGAIN) from error
    return Held(spec, fragments, small)


def _held(store: Store, items: Items, key: str, entry: Entry, chunks: list[Chunk], checksums: list[Checksum]) -> Held:
    fragments, small = [], None
    for chunk in chunks:
        assert chunk.stored is not None
        extent, own = items.tensor(chunk.stored, chunk.sizes, entry.dtype, key=key)
        fragments.append(Fragment(Box(chunk.offsets, chunk.sizes), extent))
        checksums += own
        small = items.small(chunk.stored) if len(chunks) == 1 else None
    return assemble(store.url, key, TensorSpec(entry.shape, entry.dtype), tuple(fragments), small=small)


def distinct_chunks(where: str, key: str, entry: Entry) -> list[Chunk]:
    """The chunks that have elements, each once: replicas that several ranks listed share one item.

    ConflictError if ranks listed one of them with different sizes, FitError for a dtype unknown to ucp.
    """
    if entry.dtype not in ITEMSIZE:
        raise FitError(
            f"{where}: {key} is of dtype {entry.dtype}", hint=f"dtypes that can be read: {' '.join(ITEMSIZE)}"
        )
    found: dict[Shape, Chunk] = {}
    for chunk in entry.chunks:
        if 0 in chunk.sizes:
            continue
        before = found.setdefault(chunk.offsets, chunk)
        if before.sizes != chunk.sizes:
            raise ConflictError(
                f"{where}: {key}: the chunk at {list(chunk.offsets)} is {list(before.sizes)} on one rank and "
                f"{list(chunk.sizes)} on another",
                hint="ranks saved different tensors under one name; give each its own name and save again",
            )
    return list(found.values())


def check_places(where: str, metadata: Metadata) -> None:
    """CorruptError for two items of `metadata` that share bytes of a file."""
    by_object: dict[str, dict[tuple[int, int], str]] = {}
    for key, stored in metadata.stored():
        place = (stored.offset, stored.offset + stored.length)
        if not stored.length:
            continue
        other = by_object.setdefault(stored.object, {}).setdefault(place, key)
        if other != key:
            raise _shared(where, stored.object, other, key)
    for path, places in by_object.items():
        for before, after in pairwise(sorted(places)):
            if after[0] < before[1]:
                raise _shared(where, path, places[before], places[after])


def _shared(where: str, path: str, one: str, other: str) -> CorruptError:
    return CorruptError(f"{where}: {one} and {other} share bytes of {path}", hint=_AGAIN)


def objects(contents: Contents) -> Mapping[str, tuple[int, str]]:
    """Size and fingerprint of every file used."""
    return {entry.path: (entry.size, entry.fingerprint) for entry in contents.entries}
