"""What a save finds in the folder that it fills, seen before it writes anything.

What was there then may be deleted once the save is a checkpoint: whoever writes it cannot become one any more. What
comes later belongs to somebody who may yet. See spec/commit-protocol.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ucp.errors import ConflictError, NotFoundError, StorageError, UcpError, UsageError
from ucp.format.native_manifest import ROOT as NATIVE_ROOT
from ucp.format.records import ROOT as UNIVERSAL_ROOT
from ucp.run.claim import FOLDER
from ucp.store import Store

_ROOTS = (NATIVE_ROOT, UNIVERSAL_ROOT)
_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")


@dataclass(frozen=True, slots=True)
class Ground:
    """The fingerprint of the root object that is to be replaced, if any, and the `old` objects, of dead saves too.

    `empty` if nothing at all is there.
    """

    root: str | None
    old: tuple[str, ...]
    empty: bool

    def clear(self, store: Store, warn: Callable[[UcpError], None]) -> None:
        """Delete the old objects, now that there is a newer checkpoint."""
        try:
            for path in self.old:
                store.delete(path)
        except UcpError as error:
            warn(error)


def survey(store: Store, root: str | None, is_ours: Callable[[str], bool], *, overwrite: bool) -> Ground:
    """Look at the folder in which the object `root` will make a checkpoint, and objects that `is_ours` knows lie.

    ConflictError if it holds a checkpoint and not `overwrite`, or one of another form, which no single put replaces.
    """
    if overwrite and root not in _ROOTS:
        raise UsageError("a checkpoint of this form cannot replace another one", hint="save to another place")
    found = {name: fingerprint for name in _ROOTS if (fingerprint := _fingerprint(store, name)) is not None}
    if found and not overwrite:
        raise ConflictError(f"{store.url}: already holds a checkpoint", hint="save to another place, or overwrite it")
    if found.keys() - {root}:
        raise ConflictError(f"{store.url}: holds a checkpoint of another form", hint="save to another place")
    paths = [entry.path for entry in store.entries()]
    old = [path for path in paths if is_ours(path) or path.startswith(FOLDER) or _cut_short(path, is_ours)]
    return Ground(found.get(root or ""), tuple(old), not paths)


def _cut_short(path: str, is_ours: Callable[[str], bool]) -> bool:
    """Whether it is what a local put left that was killed before it gave its object the name."""
    name = _TEMPORARY.sub("", path)
    return name != path and (is_ours(name) or name in _ROOTS)


def unchanged(store: Store, root: str, before: str | None) -> bool:
    """Whether the root object is still the one of `before`; no if that cannot be told."""
    with suppress(UcpError):
        return _fingerprint(store, root) == before
    return False


def check_whole(store: Store, sizes: Mapping[str, int], *, root: str, before: str | None, prefix: str = "") -> None:
    """The last look before `root` is put in place of `before`: what was written below `prefix` has the `sizes` told.

    ConflictError where another save was first, StorageError where an object is gone or changed for another reason.
    """
    there = {entry.path: entry.size for entry in store.entries(prefix)}
    missing = next((path for path, size in sizes.items() if there.get(path) != size), None)
    if missing is not None and unchanged(store, root, before):
        raise StorageError(f"{store.url}/{missing}: gone, or changed, before the save was over")
    if missing is not None or any(store.exists(other) for other in _ROOTS if other != root):
        raise ConflictError(f"{store.url}: another save was first", hint="save to another place, or overwrite it")


def _fingerprint(store: Store, path: str) -> str | None:
    try:
        return store.entry(path).fingerprint
    except NotFoundError:
        return None
