"""The claim: who is at work in a folder, and under which names, so that two writers never write the same object.

Stores without locks cannot keep a second writer out, nor can anybody tell a slow writer from a dead one. A writer
therefore claims the folder with one conditional put. Whoever takes over from another writes under names of its own, a
*generation*, and what makes the one or the other a checkpoint is the conditional put of the root alone.

Normative text: spec/commit-protocol.md.
"""

from __future__ import annotations

import json
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass

from ucp.errors import ConflictError, NotFoundError
from ucp.store import Store

FOLDER = ".ucp-journal/"
"""Where claims and notes of unfinished work lie, in the folder that is written."""

VERSION = 2
"""Of the form of claims and notes; what another version left is not gone on with."""

HEAD = FOLDER + "plan.json"

_GENERATION = re.compile(r"[0-9a-z]{0,32}")


@dataclass(frozen=True, slots=True)
class Claim:
    """The `fingerprint` of a plan, and the `generation` it is written as; `seen` is the claim's own fingerprint."""

    fingerprint: str
    generation: str = ""
    seen: str = ""


def claim_of(store: Store) -> Claim | None:
    """The claim on `store`, or None if there is none; of no plan if it is damaged or of another version."""
    try:
        seen = store.entry(HEAD).fingerprint
        head = json.loads(store.read(HEAD))
    except NotFoundError:
        return None
    except (ValueError, RecursionError):
        return Claim("", "", seen)
    if not isinstance(head, dict) or head.get("version") != VERSION or not is_generation(head.get("generation", "")):
        return Claim("", "", seen)
    return Claim(str(head.get("fingerprint", "")), str(head.get("generation", "")), seen)


def is_generation(value: object) -> bool:
    """Whether `value` can be a generation, which becomes a part of names; the first is empty."""
    return isinstance(value, str) and _GENERATION.fullmatch(value) is not None


def new_generation() -> str:
    """A generation that nobody else has."""
    return uuid.uuid4().hex[:12]


def claim(store: Store, fingerprint: str, *, generation: str = "", over: Claim | None = None) -> Claim:
    """Claim `store` for a plan, in place of the claim `over` if there is one.

    Where the same plan is claimed already, that claim is shared: both write the same bytes. ConflictError if another
    one has come first.
    """
    head = json.dumps({"version": VERSION, "fingerprint": fingerprint, "generation": generation}).encode()
    try:
        store.put(HEAD, head, if_absent=over is None, if_match=over.seen if over else None)
    except ConflictError:
        found = claim_of(store)
        if found is None or found.fingerprint != fingerprint:
            raise ConflictError(
                f"{store.url}: another writer has just begun here", hint="wait for it to end, or choose another place"
            ) from None
        return found
    return Claim(fingerprint, generation)


def resumed(store: Store, held: Claim) -> Claim:
    """Go on under a claim that was found; ConflictError if it is taken over just now.

    It is shown first, and looked at again then, so that nobody who takes the work for given up removes it meanwhile.
    """
    if store.locks:
        return held
    store.put(f"{FOLDER}resumed-{uuid.uuid4().hex[:12]}", b"")
    now = claim_of(store)
    if now is None or now.seen != held.seen:
        raise ConflictError(f"{store.url}: is taken over, or being removed", hint="wait, then run the command again")
    return held


def withdraw(store: Store) -> None:
    """Delete the claim and the notes of `store`, the claim last, so that what is left is never taken for another's."""
    with suppress(NotFoundError):
        for path in sorted((entry.path for entry in store.entries(FOLDER)), key=lambda path: path == HEAD):
            store.delete(path)
