"""The pool of a run: the folder ``shared`` beside its checkpoints, which holds objects by their content.

Normative text: spec/commit-protocol.md, "Shared objects and garbage".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ucp.errors import CorruptError
from ucp.store import Buffer, Store
from ucp.store.mounted import MountedStore

POOL = "shared"
"""Name of the folder, and of the prefix under which a catalog names what lies in it."""

SHARED_VERSION = "1.1"
"""Version of a manifest that names shared objects."""

_NAME = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = 4 << 20


def content_name(data: Buffer) -> str:
    """The name of an object with these bytes: its BLAKE3 in hexadecimal."""
    from blake3 import blake3

    return blake3(data).hexdigest()


def stored_name(store: Store, path: str, size: int) -> str:
    """The name that the first `size` bytes of an object give."""
    from blake3 import blake3

    digest = blake3()
    for at in range(0, size, _PIECE_BYTES):
        digest.update(store.read(path, at, min(_PIECE_BYTES, size - at)))
    return digest.hexdigest()


def is_name(text: str) -> bool:
    """Whether an object of the pool can have that name."""
    return _NAME.fullmatch(text) is not None


def path_of(name: str) -> str:
    """The path by which a catalog names a shared object."""
    return f"{POOL}/{name}"


def name_in(path: str) -> str | None:
    """The name of the shared object that a catalog has at `path`; None for an object of the checkpoint's own."""
    folder, _, name = path.partition("/")
    return name if folder == POOL and is_name(name) else None


def shared_name(row: Mapping[str, object], where: str) -> str | None:
    """Name of what a row of a manifest shares, None if it shares nothing; CorruptError for what is no name."""
    if "shared" not in row:
        return None
    name = row["shared"]
    if not isinstance(name, str) or not is_name(name):
        raise CorruptError(f"{where}: {name!r} is no name of a shared object"[:300], hint="do not trust this file")
    return name


def with_shared(store: Store, paths: Iterable[str]) -> Store:
    """`store` with those of `paths` that are shared; itself if none is, or if it has them already."""
    names = {name for path in paths if (name := name_in(path)) is not None}
    if not names or isinstance(store, MountedStore):
        return store
    return MountedStore(store, store.sibling(POOL), names)
