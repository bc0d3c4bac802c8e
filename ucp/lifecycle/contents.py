"""What belongs to a checkpoint: every object of it, which of them make it one, and the digests that it keeps."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ucp.catalog import Checksum
from ucp.converter import Converter, find_converter
from ucp.errors import CorruptError, FitError, NotFoundError, UnsafeError, UsageError
from ucp.format import native_manifest, records
from ucp.format.pool import name_in, with_shared
from ucp.lifecycle.materialise import materialised
from ucp.run.destination import record_path, recorded
from ucp.run.integrity import Spans
from ucp.store import Entry, Store

OWN = {"universal": records.ROOT, "native": native_manifest.ROOT}
"""The families whose root object alone makes a checkpoint, with its path; their manifest digests every byte."""

COPIED = "ucp-copy.json"
"""Object beside a copy of a family that keeps no digests of every byte: what was copied, with its crc32c."""

_ROOTS = (
    *("config.json", "adapter_config.json", "checkpoint.json", "latest_checkpointed_iteration.txt"),
    *(".metadata", "latest_universal", "latest"),
)
"""Objects by which readers of other families know a complete checkpoint, or the newest one of several."""
_INDEX = ".index.json"
_OURS = re.compile(
    r"\.ucp-journal/|(tensors|state|digests|shards|shared)\b|(zarr|ucp)\.json$|ucp-conversion\b|.*\.\d+-\d+\.tmp$"
)
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Contents:
    """The objects of a checkpoint of `family` in `store`, by path.

    `roots` are those to be written last, in this order. `checksums` are the digests that the checkpoint keeps itself.
    `shared` are objects of the run's pool that it needs beside, their sizes by name.
    """

    family: str
    store: Store
    objects: Mapping[str, Entry]
    roots: tuple[str, ...]
    checksums: Sequence[Checksum] = field(default=())
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether the last root alone makes it a checkpoint and names everything else with its digest."""
        return self.family in OWN

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.size for entry in self.objects.values())

    @cached_property
    def spans(self) -> Spans:
        """The digests by object and offset."""
        return Spans(self.checksums)

    @property
    def large(self) -> list[Entry]:
        """All objects but the roots, the largest first: the last ones to finish are then small."""
        rest = (entry for path, entry in self.objects.items() if path not in self.roots)
        return sorted(rest, key=lambda entry: (-entry.size, entry.path))

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever one of the objects does."""
        rows = sorted((entry.path, entry.size, entry.fingerprint) for entry in self.objects.values())
        return hashlib.sha256(json.dumps(["copy", 1, rows]).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """CorruptError if one of the objects is not what it was when this was made."""
        now = _now(self.store, self.objects)
        for path, entry in self.objects.items():
            if path not in now or now[path].fingerprint != entry.fingerprint:
                raise CorruptError(
                    f"{self.store.url}/{path}: was changed or removed while it was copied",
                    hint="wait until nobody writes it, then run the same command with --restart",
                )


def read_contents(url: str, *, family: str | None = None, pooled: bool = False, **options: Any) -> Contents:
    """What belongs to the checkpoint at `url`; `options` go to its family's reader.

    Of the universal and the native form that is what the manifest lists and what others put beside it; of another
    family it is the whole folder. What the checkpoint shares with others of its run is taken for its own, unless
    `pooled`. Raises what the family's reader raises for a damaged one; UnsafeError for names that lead out of a folder.
    """
    found, store = find_converter(url, family=family)
    if found.family in OWN:
        return _checked(_of_ours(found, store, pooled=pooled, **options))
    checksums: Sequence[Checksum] = ()
    used: Mapping[str, tuple[int, str]] = {}
    try:
        catalog = found.read(store, **options)
        checksums, used = catalog.checksums, catalog.objects
    except (FitError, UsageError):
        if options or not store.lists:
            raise  # else it is a layout that this family's reader needs to be told of; its bytes can be copied
    everything = store.entries() if store.lists else (Entry(path, *info) for path, info in used.items())
    entries = {entry.path: entry for entry in everything if not _passing(entry.path)}
    return _checked(Contents(found.family, store, entries, _roots(entries), checksums))


def _of_ours(found: Converter, store: Store, *, pooled: bool, **options: Any) -> Contents:
    catalog = found.read(store, **options)
    shared = {name: size for path, (size, _) in catalog.objects.items() if (name := name_in(path)) is not None}
    if shared and not pooled:
        store = materialised(found.family, with_shared(store, catalog.objects))
        catalog = found.read(store)
        shared = {}
    listed = {
        path: Entry(path, size, mark) for path, (size, mark) in catalog.objects.items() if name_in(path) not in shared
    }
    beside = {entry.path: entry for entry in _beside(store, OWN[found.family])}
    store = with_shared(store, catalog.objects)
    return Contents(found.family, store, {**beside, **listed}, (OWN[found.family],), catalog.checksums, shared)


def check_names(paths: Iterable[str]) -> None:
    """UnsafeError for a path that could lead out of the folder that it is written to, on any kind of store."""
    for path in paths:
        parts = path.split("/")
        if "\0" in path or "\\" in path or _DRIVE.match(path) or not {"", ".", ".."}.isdisjoint(parts):
            raise UnsafeError(f"{path!r} is no name of an object inside a folder", hint="do not trust this checkpoint")


def _checked(contents: Contents) -> Contents:
    if not contents.objects:
        raise NotFoundError(f"{contents.store.url}: holds no objects")
    check_names(contents.objects)
    return contents


def _beside(store: Store, root: str) -> Iterator[Entry]:
    """What lies beside the objects of a checkpoint of ours and is not ours, such as a README; and our record of it."""
    made = recorded(store, root) if store.lists else None
    mine = None if made is None else record_path(made.generation)
    for entry in store.entries() if store.lists else ():
        if entry.path == mine or not (_OURS.match(entry.path) or entry.path == COPIED):
            yield entry


def _passing(path: str) -> bool:
    """Whether an object is no part of a checkpoint, but of a write under way or of a copy."""
    return path == COPIED or path.startswith(".ucp-journal/") or re.fullmatch(r".*\.\d+-\d+\.tmp", path) is not None


def _roots(paths: Iterable[str]) -> tuple[str, ...]:
    """Of a foreign family: the inner ones first, and in each folder indexes before what names the checkpoint."""
    known = [path for path in paths if (name := path.rpartition("/")[2]) in _ROOTS or name.endswith(_INDEX)]

    def order(path: str) -> tuple[int, int, str]:
        name = path.rpartition("/")[2]
        return (-path.count("/"), _ROOTS.index(name) if name in _ROOTS else -1, path)

    return tuple(sorted(known, key=order))


def _now(store: Store, paths: Iterable[str]) -> dict[str, Entry]:
    if store.lists:
        return {entry.path: entry for entry in store.entries()}
    return {path: store.entry(path) for path in paths if store.exists(path)}


__all__ = ["COPIED", "OWN", "Contents", "check_names", "read_contents"]
