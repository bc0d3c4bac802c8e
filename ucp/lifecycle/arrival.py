"""The place that a copy is made at: what lies there, and how the copy becomes a checkpoint there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucp.errors import ConflictError, CorruptError, UsageError
from ucp.format import native_manifest, records
from ucp.lifecycle.contents import COPIED, OWN, Contents, check_names
from ucp.run.claim import FOLDER, Claim, claim, claim_of, new_generation, resumed, withdraw
from ucp.run.destination import State, lost
from ucp.store import Store

_VERSION = 1
_IS_OURS = {"native": native_manifest.is_ours, "universal": records.is_ours}


@dataclass(frozen=True, slots=True)
class Arrival:
    """What there is at the destination of a copy: nothing yet, a part of this copy, or all of it; and whose claim."""

    state: State
    claim: Claim | None = None


def examine(destination: Store, contents: Contents, *, restart: bool) -> Arrival:
    """Whether the destination is empty, resumable, or holds this very copy; changes nothing.

    UsageError if it holds anything else, CorruptError for a complete copy that has lost objects since.
    """
    claim = claim_of(destination)
    if _is_copy(destination, contents):
        for path in lost(destination, {entry.path: entry.size for entry in contents.objects.values()}):
            raise CorruptError(
                f"{destination.url}/{path}: missing or cut short since the copy was complete",
                hint=f"`ucp repair {destination.url} --from {contents.store.url}` puts it right",
            )
        return Arrival("done", claim)
    if claim is None:
        if not set(destination.children()) <= {FOLDER}:
            raise UsageError(f"{destination.url}: holds something else", hint="choose another destination")
        return Arrival("new")
    if any(destination.exists(root) for root in OWN.values()):
        raise UsageError(f"{destination.url}: holds another checkpoint", hint="choose another destination")
    if claim.fingerprint == contents.fingerprint:
        return Arrival("partial", claim)
    if not restart:
        raise UsageError(
            f"{destination.url}: holds an unfinished copy or conversion of something else, or of a source that has "
            "changed",
            hint="--restart throws it away and starts again",
        )
    return Arrival("new", claim)


def claimed(destination: Store, contents: Contents, found: Arrival) -> Claim:
    """The claim of this copy on the destination; ConflictError if another writer was first."""
    mine = found.claim
    if mine is None or found.state != "partial":
        generation = new_generation() if mine is not None else ""  # notes of another plan are not to be taken for ours
        mine = claim(destination, contents.fingerprint, generation=generation, over=mine)
    else:
        mine = resumed(destination, mine)
    check_still_none(destination, contents)
    return mine


def remains(destination: Store, contents: Contents) -> list[str]:
    """What an earlier writer has left, to be deleted once the copy is a checkpoint: whoever wrote it cannot be then.

    Of families whose readers take what they find, it is deleted at once.
    """
    paths = [entry.path for entry in destination.entries() if entry.path not in contents.objects]
    is_ours = _IS_OURS.get(contents.family)
    if is_ours is not None:
        return [path for path in paths if is_ours(path)]
    for path in paths:
        if not path.startswith(FOLDER):
            destination.delete(path)
    return []


def check_still_none(destination: Store, contents: Contents) -> None:
    """ConflictError if another writer has made a checkpoint, and given up its claim, before this one claimed."""
    if not _is_partly(destination, contents):
        withdraw(destination)
        raise ConflictError(f"{destination.url}: another writer was first", hint="look at what is there now")


def _is_partly(destination: Store, contents: Contents) -> bool:
    """Whether all roots that are there, if any, are those of this copy."""
    there = [root for root in {*contents.roots, *OWN.values()} if destination.exists(root)]
    return all(root in contents.objects and destination.read(root) == contents.store.read(root) for root in there)


def record(contents: Contents, digests: Mapping[str, int]) -> bytes:
    """The bytes of ``ucp-copy.json``, by which a copy of a family that digests little is known to be whole."""
    rows = [
        {"path": path, "size": contents.objects[path].size, "crc32c": value} for path, value in sorted(digests.items())
    ]
    doc = {"format": "copy", "version": _VERSION, "fingerprint": contents.fingerprint, "objects": rows}
    return json.dumps(doc, indent=1).encode()


def recorded(store: Store) -> dict[str, tuple[int, int]]:
    """Size and crc32c of each object of the copy in `store`; empty where no copy was noted, or the note is damaged.

    UnsafeError for a name that leads out of the folder.
    """
    doc = _read(store)
    try:
        found = {str(row["path"]): (int(row["size"]), int(row["crc32c"])) for row in doc.get("objects", [])}
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
    check_names(found)
    return found


def put_last(destination: Store, path: str, data: bytes) -> None:
    """Put the object that makes the copy a checkpoint; ConflictError if another writer put one with other bytes."""
    try:
        destination.put(path, data, if_absent=True)
    except ConflictError:
        if destination.read(path) != data:
            raise


def _is_copy(destination: Store, contents: Contents) -> bool:
    """Whether the destination is a copy of `contents`, complete once."""
    if not contents.own:
        return _read(destination).get("fingerprint") == contents.fingerprint
    root = contents.roots[-1]
    return destination.exists(root) and destination.read(root) == contents.store.read(root)


def _read(store: Store) -> dict[str, Any]:
    if not store.exists(COPIED):
        return {}
    try:
        doc = json.loads(store.read(COPIED))
    except (ValueError, RecursionError):
        return {}
    known = isinstance(doc, dict) and (doc.get("format"), doc.get("version")) == ("copy", _VERSION)
    return doc if known else {}
