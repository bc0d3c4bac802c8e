"""The destination of a conversion: whether it may be written, what an earlier run left, whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

from ucp.converter import Target
from ucp.errors import CorruptError, NotFoundError, StorageError, UsageError
from ucp.run.claim import FOLDER, Claim, claim_of, is_generation, withdraw
from ucp.run.crc import crc
from ucp.store import Store

State = Literal["new", "partial", "done"]
_RECORD = "ucp-conversion"
Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a conversion makes: a `target`, by the plan that has this `fingerprint`.

    `replaces` says that a checkpoint that is there may be replaced, `restart` that another conversion's remains may.
    """

    target: Target
    fingerprint: str
    replaces: bool = False
    restart: bool = False

    @property
    def root(self) -> str:
        """The object that makes it a checkpoint."""
        return self.target.root

    def placed(self, generation: str) -> Target:
        """The target under the names of a generation."""
        return cast("Target", cast("Any", self.target).relocated(generation)) if generation else self.target

    def sizes(self, generation: str) -> Sizes:
        """Sizes of the large objects of a generation, by path."""
        return {task.object: task.size for task in self.placed(generation).tasks}


@dataclass(frozen=True, slots=True)
class Found:
    """What there is: the fingerprint of the `root` object, a `claim`, and the `generation` that is done or under way.

    `empty` if there is neither an object nor a claim.
    """

    state: State
    root: str | None = None
    claim: Claim | None = None
    generation: str = ""
    empty: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What is noted of a conversion beside its root: its plan, what it was made from, and the crc32c of its root."""

    fingerprint: str
    source: str
    to: str
    generation: str
    root: int

    def encoded(self) -> bytes:
        """As it is stored."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=1).encode()


def record_path(generation: str) -> str:
    """Object beside the root that says which source state the checkpoint was made from."""
    return f"{_RECORD}.{generation}.json" if generation else f"{_RECORD}.json"


RECORD = record_path("")


def examine(destination: Store, wanted: Wanted) -> Found:
    """Whether the destination is empty, resumable or complete, and what is in the way of it.

    UsageError if it holds anything that may not be replaced, CorruptError for a complete result that has lost objects.
    Changes nothing.
    """
    root = fingerprint_of(destination, wanted.root)
    claim = claim_of(destination)
    if root is not None:
        record = recorded(destination, wanted.root)
        if record is not None and record.fingerprint == wanted.fingerprint:
            _check_done(destination, wanted.sizes(record.generation))
            return Found("done", root, claim, record.generation)
        if not wanted.replaces:
            raise UsageError(
                f"{destination.url}: already holds another checkpoint",
                hint="choose another destination, or replace it with --overwrite",
            )
    if claim is not None and claim.fingerprint == wanted.fingerprint:
        return Found("partial", root, claim, claim.generation)
    empty = root is None and claim is None and _is_empty(destination)
    if claim is None and root is None and not empty:
        if destination.exists(wanted.root):  # another writer has just finished
            return examine(destination, wanted)
        raise UsageError(f"{destination.url}: not empty, and no conversion of ours", hint="choose another destination")
    if claim is not None and not wanted.restart:
        raise UsageError(
            f"{destination.url}: holds an unfinished conversion with other options, of another source, of one that has "
            "changed, or by another version",
            hint="--restart throws it away and starts again",
        )
    return Found("new", root, claim, empty=empty)


def _is_empty(destination: Store) -> bool:
    """Whether there is nothing, or nothing but notes whose claim has gone."""
    return not destination.lists or set(destination.children()) <= {FOLDER}


def fingerprint_of(destination: Store, path: str) -> str | None:
    """Fingerprint of the object at `path`, None if there is none."""
    try:
        return destination.entry(path).fingerprint
    except NotFoundError:
        return None


def _check_done(destination: Store, sizes: Sizes) -> None:
    for path in lost(destination, sizes):
        raise CorruptError(
            f"{destination.url}/{path}: missing or cut short since the conversion was complete",
            hint="delete this folder and convert again",
        )


def clear(destination: Store) -> None:
    """Delete an unfinished conversion; its claim goes last, so that this too can be resumed."""
    for entry in list(destination.entries()):
        if not entry.path.startswith(FOLDER):
            destination.delete(entry.path)
    withdraw(destination)


def lost(destination: Store, sizes: Sizes) -> list[str]:
    """Of the objects named in `sizes`, those that are missing or of another size; one listing."""
    found = {entry.path: entry.size for entry in destination.entries()}
    return [path for path, size in sizes.items() if found.get(path) != size]


def check_whole(destination: Store, sizes: Sizes) -> None:
    """StorageError if an object that was written is there no more: the last look before the root is put."""
    for path in lost(destination, sizes):
        raise StorageError(
            f"{destination.url}/{path}: was written, and is gone or cut short",
            hint="somebody else changes the destination; run the same command again: it resumes",
        )


def superseded(destination: Store, claim: Claim, is_ours: Callable[[str], bool]) -> list[str]:
    """What other generations have left, to be deleted once that of `claim` is a checkpoint; none if it has no name.

    Listed before the claim is looked at once more: whoever takes over from it begins later, and is not in the list.
    """
    if not claim.generation:
        return []
    mark = f".{claim.generation}"
    found = [entry.path for entry in destination.entries() if is_ours(entry.path) and mark not in entry.path]
    now = claim_of(destination)
    return found if now is not None and now.generation == claim.generation else []


def refuse_overlap(source: Store, destination: Store) -> None:
    """UsageError if one of the two folders lies in the other: sources are never modified."""
    if source.overlaps(destination):
        raise UsageError(
            f"source {source.url} and destination {destination.url} overlap",
            hint="write the result to a folder of its own: sources are never modified",
        )


def recorded(destination: Store, root: str) -> Record | None:
    """The conversion that made the checkpoint; None if there is no readable record of it."""
    digest = crc("crc32c", destination.read(root))
    for path in destination.children():
        if path.startswith(_RECORD) and path.endswith(".json"):
            with suppress(NotFoundError):  # another writer may just have replaced it
                found = _parsed(destination.read(path))
                if found is not None and found.root == digest:
                    return found
    return None


def _parsed(data: bytes) -> Record | None:
    try:
        doc = json.loads(data)
        record = Record(**doc)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (record.fingerprint, record.source, record.to)
    return record if is_generation(record.generation) and all(isinstance(text, str) for text in texts) else None
