"""The end of a conversion: its small objects, and last its root, which is what makes a checkpoint of them.

Source of the order: spec/commit-protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from ucp.errors import ConflictError, StorageError
from ucp.run.conversion import Conversion
from ucp.run.crc import crc
from ucp.run.destination import Record, check_whole, fingerprint_of, record_path, recorded
from ucp.run.journal import Done
from ucp.store import Store


def commit(conversion: Conversion, done: Mapping[str, Done], before: str | None, generation: str) -> tuple[int, bool]:
    """Put the small objects, and the root last, in place of the root `before` if there is one.

    Returns their bytes, and whether the checkpoint is of this generation now: the same one may be there as another.
    """
    ours = False
    destination, target = conversion.destination, conversion.target
    sizes: dict[str, int] = {}
    for path, data in target.finish({name: finished.digests for name, finished in done.items()}):
        assert target.root not in sizes, f"{conversion.to} put {path} after its root"
        sizes[path] = len(data)
        if path != target.root:
            destination.put(path, data, durable=False)
            continue
        note = _record(conversion, generation, data)
        destination.put(record_path(generation), note, durable=False)
        destination.flush([*(small for small in sizes if small != path), record_path(generation)])
        small = {name: size for name, size in sizes.items() if name != path}
        _check_whole(conversion, {**conversion.sizes, **small, record_path(generation): len(note)}, before)
        ours = _put_root(conversion, data, before, generation) == generation
    assert target.root in sizes, f"{conversion.to} did not put its root"
    return sum(sizes.values()) + len(note), ours


def _check_whole(conversion: Conversion, sizes: Mapping[str, int], before: str | None) -> None:
    """The last look before the root is put. ConflictError if objects are gone since another writer was first."""
    try:
        check_whole(conversion.destination, sizes)
    except StorageError:
        if fingerprint_of(conversion.destination, conversion.target.root) == before:
            raise
        raise _another_was_first(conversion.destination) from None


def _another_was_first(destination: Store) -> ConflictError:
    return ConflictError(
        f"{destination.url}: another writer has made or removed a checkpoint here meanwhile",
        hint="what is there is whole; choose another destination",
    )


def _put_root(conversion: Conversion, data: bytes, before: str | None, generation: str) -> str:
    """The commit; gives the generation that is the checkpoint now.

    ConflictError if another writer has made a checkpoint here meanwhile that is not the same.
    """
    destination, root = conversion.destination, conversion.target.root
    try:
        destination.put(root, data, if_absent=before is None, if_match=before)
    except ConflictError:
        found = recorded(destination, root) if destination.exists(root) else None
        if found is None or found.fingerprint != conversion.wanted.fingerprint:
            raise _another_was_first(destination) from None
        return found.generation
    return generation


def _record(conversion: Conversion, generation: str, root: bytes) -> bytes:
    digest = crc("crc32c", root)
    return Record(conversion.wanted.fingerprint, conversion.source.url, conversion.to, generation, digest).encoded()
