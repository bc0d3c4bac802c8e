"""What lies in the folder of a run beside its complete checkpoints, and what of that is ours to remove."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ucp.errors import ConflictError, NotFoundError
from ucp.format import native_manifest, records
from ucp.format.documents import parsed
from ucp.format.manifest import read_manifest
from ucp.format.pool import POOL, is_name
from ucp.lifecycle.contents import COPIED
from ucp.lifecycle.shelf import is_record
from ucp.run.claim import FOLDER, HEAD, claim, claim_of, new_generation
from ucp.share.lease import is_lease
from ucp.share.ledger import LEDGER
from ucp.share.references import ROOTS, shared_by
from ucp.store import Entry, Store

COLLECTED = "ucp-gc"
"""The plan of a claim by which a folder is being removed."""

_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")
_RECORD = re.compile(r"step-(\d{8,18})\.json")
_NOTE = re.compile(r"ucp-conversion(\.\w{1,32})?\.json")
_MADE = re.compile(
    r"tensors(\.\w{1,32})?/(zarr\.json|[^/]+/(zarr\.json|c/0(/\d+)*))|state/blobs(\.\w{1,32})?\.safetensors"
    rf"|state(\.\w{{1,32}})?\.json|digests(\.\w{{1,32}})?\.bin|{_NOTE.pattern}"
)
"""Names of the objects of a universal checkpoint of any generation, and of nothing else in its folders."""


_WITNESS = re.compile(rf"{re.escape(FOLDER)}.*|{re.escape(COPIED)}|digests\.\w{{1,32}}\.bin|{_NOTE.pattern}")
"""Names that nobody else gives: others have folders with a ``state.json`` or Zarr arrays in ``tensors`` too."""


@dataclass(frozen=True, slots=True)
class Remains:
    """Something to be removed: a folder with the objects that are ours (`path` ends in ``/``), or one object.

    `fingerprint` changes whenever something in it does.
    """

    path: str
    entries: tuple[Entry, ...]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of its objects."""
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Survey:
    """A run: `complete` checkpoints, `references` to objects of its pool, remains, and what is `foreign` to us."""

    complete: tuple[str, ...]
    references: frozenset[str]
    remains: tuple[Remains, ...]
    foreign: tuple[str, ...]


def survey(run: Store) -> Survey:
    """Look at all that lies in the folder of a run, its pool left out.

    CorruptError, FitError where the root object of a checkpoint cannot be read: what it needs is not known.
    """
    complete, references, remains, foreign = [], set[str](), list[Remains](), list[str]()
    children = run.children()
    for name in children:
        if name == f"{POOL}/":
            continue
        if not name.endswith("/"):
            found = _loose(run, name, children)
            remains += [found] if found else []
            step = _RECORD.fullmatch(name)
            foreign += [name] if found is None and not (step and f"step-{step[1]}/" in children) else []
            continue
        needed = shared_by(run.child(name[:-1]))
        if needed is not None:
            complete.append(name[:-1])
            references |= needed.keys()
        try:
            left = folder_remains(run, name, whole=needed is not None)
        except NotFoundError:  # somebody is changing it right now, and a later run looks again
            continue
        remains += [left] if left else []
        foreign += [name] if left is None and needed is None else []
    return Survey(tuple(complete), frozenset(references), tuple(remains), tuple(foreign))


def references(run: Store) -> frozenset[str]:
    """The objects of the pool that the checkpoints of a run need, as they are now."""
    folders = (name for name in run.children() if name.endswith("/") and name != f"{POOL}/")
    return frozenset(name for folder in folders for name in shared_by(run.child(folder[:-1])) or ())


def folder_remains(run: Store, name: str, *, whole: bool) -> Remains | None:
    """What of the folder `name` is to be removed, all of it if it is not a `whole` checkpoint; None if nothing is.

    A folder that is none, and holds anything that only somebody else can have put there, is left alone; so is one in
    which nothing, nor a record beside it, shows that it is ours.
    """
    entries = list(run.entries(name))
    paths = {entry.path.removeprefix(name): entry for entry in entries}
    listed = _noted(run, name, paths)
    needed = _needed(run.child(name[:-1]), paths) if whole else frozenset[str]()
    ours = [path for path in paths if _is_ours(path, listed)]
    if not ours or (not whole and any(path not in listed and not _is_ours(path, listed) for path in paths)):
        return None
    if not whole and not (any(map(_is_witness, ours)) or _is_recorded(run, name)):
        return None
    left = [path for path in ours if path not in needed and not (whole and (_NOTE.fullmatch(path) or path == COPIED))]
    if not left:
        return None
    marks = [paths[path] for path in [*left, *(root for root in ROOTS if root in paths)]]
    return Remains(name, tuple(paths[path] for path in left), _fingerprint(marks))


def pool_strays(pool: Store) -> tuple[list[Remains], list[str]]:
    """What puts that were cut short have left in the pool, and what is foreign there."""
    strays, foreign = [], []
    for entry in pool.entries():
        path = entry.path
        known = is_name(path) or path == LEDGER or is_lease(path)
        plain = _TEMPORARY.sub("", path)
        if plain != path and (is_name(plain) or plain == LEDGER or is_lease(plain)):
            placed = Entry(f"{POOL}/{path}", entry.size, entry.fingerprint)
            strays.append(Remains(placed.path, (placed,), _fingerprint([placed])))
        elif not known:
            foreign.append(f"{POOL}/{path}")
    return strays, foreign


def remove(run: Store, remains: Remains) -> bool:
    """Delete remains if they are still what they were; whether that was so.

    Of a folder with a claim the claim is taken over first and deleted last: whoever goes on with the work that it
    stands for shows that before (`ucp.run.claim.resumed`), or finds it taken.
    """
    if not remains.path.endswith("/"):
        return _delete_unchanged(run, remains)
    folder = run.child(remains.path[:-1])
    try:
        with folder.exclusive():
            return _delete_claimed(run, folder, remains)
    except (ConflictError, NotFoundError):
        return False  # somebody is at work there


def _delete_claimed(run: Store, folder: Store, remains: Remains) -> bool:
    """Delete the folder's remains under a claim of our own; what claim there was is put back if they have changed."""
    head = next((entry for entry in remains.entries if entry.path == remains.path + HEAD), None)
    if head is None:
        return _delete_folder(run, remains)
    held = claim_of(folder)
    if held is None or held.seen != head.fingerprint:
        return False
    text = folder.read(HEAD)
    claim(folder, COLLECTED, generation=new_generation(), over=held)
    if _delete_folder(run, remains):
        return True
    mine = claim_of(folder)
    if mine is not None and mine.fingerprint == COLLECTED:
        with suppress(ConflictError):
            folder.put(HEAD, text, if_match=mine.seen)
    return False


def _delete_folder(run: Store, remains: Remains) -> bool:
    """Delete what was listed, if nothing else has come since; the claim goes last."""
    head = remains.path + HEAD
    known = {entry.path: entry.fingerprint for entry in remains.entries}
    now = folder_remains(run, remains.path, whole=shared_by(run.child(remains.path[:-1])) is not None)
    if now is None:
        return False
    found = {entry.path: entry.fingerprint for entry in now.entries if entry.path != head}
    if any(known.get(path) != fingerprint for path, fingerprint in found.items()):
        return False
    for path in sorted(found, key=lambda path: _is_witness(path.removeprefix(remains.path))):
        run.delete(path)  # what shows whose it is goes last, so that a collection that is cut short can be gone on with
    if head in known:
        run.delete(head)
    return True


def _delete_unchanged(run: Store, remains: Remains) -> bool:
    (entry,) = remains.entries
    try:
        if run.entry(entry.path).fingerprint != entry.fingerprint:
            return False
    except NotFoundError:
        return True
    run.delete(entry.path)
    return True


def _loose(run: Store, name: str, children: Sequence[str]) -> Remains | None:
    """A record of a step that has no folder, or one that was being written."""
    plain = _TEMPORARY.sub("", name)
    found = _RECORD.fullmatch(plain)
    if found is None or (plain == name and (f"step-{found[1]}/" in children or not is_record(run, name))):
        return None
    try:
        entry = run.entry(name)
    except NotFoundError:
        return None
    return Remains(name, (entry,), _fingerprint([entry]))


def _is_ours(path: str, listed: frozenset[str]) -> bool:
    plain = _TEMPORARY.sub("", path)
    made = native_manifest.is_ours(plain) or _MADE.fullmatch(plain) is not None
    beside = plain.startswith(FOLDER) or plain == COPIED
    return made or beside or (plain != path and plain in ROOTS) or path in listed


def _is_witness(path: str) -> bool:
    plain = _TEMPORARY.sub("", path)
    return native_manifest.is_ours(plain) or _WITNESS.fullmatch(plain) is not None


def _is_recorded(run: Store, name: str) -> bool:
    """Whether the manager of a run has noted the step whose folder this is."""
    record = f"{name[:-1]}.json"
    return _RECORD.fullmatch(record) is not None and is_record(run, record)


def _noted(run: Store, name: str, paths: Iterable[str]) -> frozenset[str]:
    """Objects of a conversion that its notes name as finished."""
    from ucp.run.journal import Done

    notes = [path for path in paths if path.startswith(FOLDER) and path.endswith(".jsonl")]
    lines = (line for path in notes for line in run.read(name + path).decode(errors="replace").splitlines())
    return frozenset(done.object for done in map(Done.parse, lines) if done is not None)


def _needed(folder: Store, paths: Iterable[str]) -> frozenset[str]:
    """The objects that the root of a complete checkpoint names."""
    found = set[str]()
    if native_manifest.ROOT in paths:
        manifest = native_manifest.loads(folder.read(native_manifest.ROOT), where=f"{folder.url}/ucp.json")
        found |= {shard.path for shard in manifest.shards} | manifest.files.keys()
    if records.ROOT in paths:
        where = f"{folder.url}/{records.ROOT}"
        doc = parsed(folder.read(records.ROOT), where=where)
        universal = read_manifest(doc["attributes"]["ucp"], where=where)
        found |= universal.files.keys()
        for array in (array for record in universal.records for array in record.arrays):
            found |= {array.object(number) for number in range(array.grid.count)}
    return frozenset(found)


def _fingerprint(entries: Iterable[Entry]) -> str:
    rows = sorted((entry.path, entry.size, entry.fingerprint) for entry in entries)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


__all__ = ["COLLECTED", "Remains", "Survey", "folder_remains", "pool_strays", "references", "remove", "survey"]
