"""The destination of a conversion: whether it may be written, what an earlier run left, whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ucp.errors import CorruptError, StorageError, UsageError
from ucp.run import journal as journals
from ucp.store import Store

RECORD = "ucp-conversion.json"
"""Object beside the root that says which source state the checkpoint was made from."""

State = Literal["new", "partial", "done"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a conversion makes: its `root`, its large objects with their `sizes`, and the `fingerprint` of its plan."""

    root: str
    sizes: Mapping[str, int]
    fingerprint: str


def examine(destination: Store, wanted: Wanted, *, restart: bool) -> State:
    """Whether the destination is empty, resumable or complete; with `restart`, what cannot be resumed counts as empty.

    UsageError if it holds anything else, CorruptError for a complete result that has lost objects. Changes nothing.
    """
    if destination.exists(wanted.root):
        if _recorded(destination) != wanted.fingerprint:
            raise UsageError(f"{destination.url}: already holds another checkpoint", hint="choose another destination")
        for path in lost(destination, wanted.sizes):
            raise CorruptError(
                f"{destination.url}/{path}: missing or cut short since the conversion was complete",
                hint="delete this folder and convert again",
            )
        return "done"
    earlier = journals.Journal.plan_of(destination)
    if earlier == wanted.fingerprint:
        return "partial"
    if earlier is None and set(destination.children()) <= {journals.FOLDER}:  # empty, or the journal's first put failed
        return "new"
    if earlier is None:
        raise UsageError(f"{destination.url}: not empty, and no conversion of ours", hint="choose another destination")
    if not restart:
        raise UsageError(
            f"{destination.url}: holds an unfinished conversion with other options, of another source, of one that has "
            "changed, or by another version",
            hint="--restart throws it away and starts again",
        )
    return "new"


def clear(destination: Store) -> None:
    """Delete an unfinished conversion; the journal's head goes last, so that this too can be resumed."""
    for entry in list(destination.entries()):
        if not entry.path.startswith(journals.FOLDER):
            destination.delete(entry.path)
    journals.remove(destination)


def lost(destination: Store, sizes: Mapping[str, int]) -> list[str]:
    """Of the objects named in `sizes`, those that are missing or of another size; one listing."""
    found = {entry.path: entry.size for entry in destination.entries()}
    return [path for path, size in sizes.items() if found.get(path) != size]


def check_whole(destination: Store, sizes: Mapping[str, int]) -> None:
    """StorageError if an object that was written is there no more: the last look before the root is put."""
    for path in lost(destination, sizes):
        raise StorageError(
            f"{destination.url}/{path}: was written, and is gone or cut short",
            hint="somebody else changes the destination; run the same command again: it resumes",
        )


def refuse_overlap(source: Store, destination: Store) -> None:
    """UsageError if one of the two folders lies in the other: sources are never modified."""
    if source.overlaps(destination):
        raise UsageError(
            f"source {source.url} and destination {destination.url} overlap",
            hint="write the result to a folder of its own: sources are never modified",
        )


def _recorded(destination: Store) -> str | None:
    """Fingerprint of the conversion that made the checkpoint; None if there is no readable record."""
    if not destination.exists(RECORD):
        return None
    try:
        record = json.loads(destination.read(RECORD))
    except (ValueError, RecursionError):
        return None
    return record.get("fingerprint") if isinstance(record, dict) else None
