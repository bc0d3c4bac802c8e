"""The folder ``.ucp-watch/`` in which watchers of a destination keep what they know, and how they change it safely."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ucp.errors import ConflictError, NotFoundError, UsageError
from ucp.store import Store

T = TypeVar("T")

FOLDER = ".ucp-watch/"
VERSION = 1
_HEAD = FOLDER + "watch.json"
_ATTEMPTS = 50
_PAUSE_SECONDS = 0.1


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which step 1000 follows step 999; of two names the one that sorts last is the newer."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


def dumps(document: Mapping[str, Any]) -> bytes:
    """A document as it is stored; the same document gives the same bytes."""
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def read_document(store: Store, path: str) -> tuple[dict[str, Any] | None, str | None]:
    """A JSON object and its fingerprint; (None, fingerprint) for what is none, (None, None) if nothing is there."""
    try:
        # The fingerprint first: a document that is replaced meanwhile is then told from the one that was read.
        seen = store.entry(path).fingerprint
        document = json.loads(store.read(path))
    except NotFoundError:
        return None, None
    except (ValueError, RecursionError):
        return None, seen
    return (document if isinstance(document, dict) else None), seen


def put_document(store: Store, path: str, document: Mapping[str, Any], *, over: str | None) -> bool:
    """Put a document in place of the one whose fingerprint is `over`, None for none; False if another is there."""
    try:
        locked(store, lambda: store.put(path, dumps(document), if_absent=over is None, if_match=over))
    except ConflictError:
        return False
    return True


def locked(store: Store, change: Callable[[], T]) -> T:
    """Do `change`, one process at a time where the store locks: there a condition of `put` needs that."""
    if not store.locks:
        return change()
    folder = store.child(FOLDER.rstrip("/"))
    for attempt in range(_ATTEMPTS):
        inside = False
        try:
            with folder.exclusive():
                inside = True
                return change()
        except ConflictError:
            if inside or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def tidy(store: Store, pointer: str) -> None:
    """Remove what puts of documents that were cut short have left; all such puts are made by one process at a time."""

    def sweep() -> None:
        store.child(FOLDER.rstrip("/")).tidy()
        folder, _, name = pointer.rpartition("/")
        for found in store.children(folder):
            if found.startswith(f"{name}.") and found.endswith(".tmp"):
                store.delete(f"{folder}/{found}" if folder else found)

    if store.locks:
        locked(store, sweep)


def agree(store: Store, what: Mapping[str, str]) -> None:
    """Note what this destination is for; UsageError if it is for something else.

    The note stays, so that the folder does.
    """
    document = {"format": "ucp-watch", "version": VERSION, **what}
    if put_document(store, _HEAD, document, over=None):
        return
    found, _ = read_document(store, _HEAD)
    if found is None or found.get("version") != VERSION:
        raise UsageError(
            f"{store.url}/{_HEAD}: damaged, or by another version of ucp",
            hint="delete it, and this pipeline goes on",
        )
    others = {name: found.get(name) for name in what if found.get(name) != what[name]}
    for name, value in others.items():
        raise UsageError(
            f"{store.url}: is the destination of a pipeline with {name} {value}, not {what[name]}",
            hint=f"choose another destination, or delete {_HEAD} there to change it",
        )
