"""What the collector of garbage knows of a run from one time to the next: one object of the pool."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.format.pool import is_name
from ucp.share.settled import read_settled
from ucp.store import Store

LEDGER = "gc.json"
_FORMAT = "ucp-gc"
_VERSION = 1

Seen = tuple[str, float]
"""A fingerprint, and since when it was seen unchanged, in seconds since 1970 by the clock of the collector."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """`unreferenced` objects and since when; leases, remains and strays, each since when it was seen as it is.

    `doomed` objects are about to be deleted, since `doomed_at`, by `collector`: no writer uses them any more. `waiting`
    are the leases of the writers that may have found them before they were doomed; None while these are not known.
    """

    unreferenced: Mapping[str, float] = field(default_factory=dict)
    leases: Mapping[str, Seen] = field(default_factory=dict)
    remains: Mapping[str, Seen] = field(default_factory=dict)
    doomed: tuple[str, ...] = ()
    doomed_at: float = 0.0
    waiting: tuple[str, ...] | None = None
    collector: str = ""


def read_ledger(pool: Store) -> tuple[Ledger, str | None]:
    """What is known, and the fingerprint of the object that says it, None if there is none.

    CorruptError for one that is damaged: nothing may be assumed then.
    """
    try:
        data, fingerprint = read_settled(pool, LEDGER)
    except NotFoundError:
        return Ledger(), None
    return _parsed(data, f"{pool.url}/{LEDGER}"), fingerprint


def write_ledger(pool: Store, ledger: Ledger, fingerprint: str | None) -> str:
    """Replace what was read with that fingerprint; ConflictError if it was replaced meanwhile. Its new fingerprint."""
    # With a mark of its own, since stores that tell objects apart by content would take it for what it replaces.
    mark = uuid.uuid4().hex
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "mark": mark, **asdict(ledger)}, indent=1).encode()
    try:
        if fingerprint is None:
            pool.put(LEDGER, text, if_absent=True)
        else:
            pool.put(LEDGER, text, if_match=fingerprint)
        data, fingerprint = read_settled(pool, LEDGER)
        if data != text:
            raise ConflictError("it was replaced at once")
    except (ConflictError, NotFoundError) as error:
        raise ConflictError(f"{pool.url}: another `ucp gc` is at work", hint="wait for it to end") from error
    return fingerprint


def _parsed(data: bytes, where: str) -> Ledger:
    try:
        doc = json.loads(data)
        if (doc["format"], doc["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another format or version")
        return Ledger(
            {str(name): float(since) for name, since in doc["unreferenced"].items()},
            _seen(doc["leases"]),
            _seen(doc["remains"]),
            tuple(map(_name, doc["doomed"])),
            float(doc["doomed_at"]),
            None if doc["waiting"] is None else tuple(map(str, doc["waiting"])),
            str(doc["collector"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(
            f"{where}: no record of the collector ({error})",
            hint="when nobody writes or collects, delete it: checkpoints stay, grace periods begin anew",
        ) from error


def _name(text: object) -> str:
    if not isinstance(text, str) or not is_name(text):
        raise ValueError(f"{text!r} is no name of an object")
    return text


def _seen(doc: Mapping[str, Any]) -> dict[str, Seen]:
    return {str(name): (str(fingerprint), float(since)) for name, (fingerprint, since) in doc.items()}
