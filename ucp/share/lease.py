"""A writer's side of a pool: what it may use, and that it is not taken away before the checkpoint is committed."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ucp.errors import ConflictError, CorruptError, NotFoundError, StorageError, UcpError, UsageError
from ucp.format.pool import content_name, is_name, stored_name
from ucp.share.ledger import read_ledger
from ucp.store import Buffer, Entry, Store

LEASES = "writers/"
_LEASE = re.compile(r"writers/[0-9a-f]{32}\.json")
_RENEW_SECONDS = 600.0
_LOG = logging.getLogger("ucp")


def is_lease(path: str) -> bool:
    """Whether the object at `path` of a pool is a lease."""
    return _LEASE.fullmatch(path) is not None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a writer may find in the pool: `present` objects, and `doomed` ones, which it must not use.

    What is doomed is not put into the pool either: a writer that needs the content keeps it in its own folder. Nothing
    is, where the pool is `closed`.
    """

    present: Mapping[str, Entry]
    doomed: frozenset[str]
    closed: bool = False

    def takes(self, name: str) -> bool:
        """Whether an object of that name may lie in the pool."""
        return not self.closed and name not in self.doomed

    def has(self, pool: Store, name: str, size: int) -> bool:
        """Whether it is there with the bytes of its name, which are read once per process. StorageError as reading."""
        entry = self.present.get(name)
        return entry is not None and entry.size == size and _is_sound(pool, entry)


_SOUND: set[tuple[str, str, str]] = set()
"""Objects that this process has read or written, with the fingerprints that they had."""


def _is_sound(pool: Store, entry: Entry) -> bool:
    """Whether an object has the bytes of its name. It is read unless it was before and has not changed since."""
    key = (pool.url, entry.path, entry.fingerprint)
    if key not in _SOUND:
        if stored_name(pool, entry.path, entry.size) != entry.path:
            return False
        _SOUND.add(key)
    return True


class Lease:
    """Announces a writer to the collector of garbage: what it finds in `offer` stays there until `release`.

    Taking one comes before looking, and looking before using. `confirm` is the last thing before the root is put.
    """

    def __init__(self, pool: Store, into: str) -> None:
        if not pool.lists:
            raise UsageError(f"{pool.url}: objects cannot be listed there, nor shared", hint="leave out share")
        self.pool, self.name, self.into = pool, f"{uuid.uuid4().hex}.json", into
        pool.put(self.path, self._text(), if_absent=True)
        self._renewed = time.monotonic()
        self.offer = look(pool)

    @property
    def path(self) -> str:
        """Where it lies in the pool."""
        return f"{LEASES}{self.name}"

    def keep(self) -> None:
        """Renew it if it is some time old; to be called now and then by writers that take long."""
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renew()

    def confirm(self, wanted: Mapping[str, int]) -> None:
        """Make sure that all objects of `wanted`, a map from name to size, are there to stay.

        StorageError where the lease or an object is gone: the root must not be put then.
        """
        self._renew()
        if not wanted:
            return
        ledger, _ = read_ledger(self.pool)
        lost = set(wanted) & set(ledger.doomed)
        if lost and ledger.waiting is not None and self.name not in ledger.waiting:
            raise self._gone(f"{min(lost)} is being collected")
        there = {entry.path: entry.size for entry in self.pool.entries() if entry.path in wanted}
        for name, size in wanted.items():
            if there.get(name) != size:
                raise self._gone(f"{name} is gone")

    def release(self) -> None:
        """The writer is done: the root is put, or never will be."""
        with suppress(UcpError):  # what is left of it ends with the grace period
            self.pool.delete(self.path)

    def _renew(self) -> None:
        """A lease that was taken for dead is gone for good: what it protected may be gone as well."""
        try:
            self.pool.put(self.path, self._text(), if_match=self.pool.entry(self.path).fingerprint)
            self._renewed = time.monotonic()
        except (NotFoundError, ConflictError) as error:
            raise self._gone("this writer was taken for dead") from error

    def _text(self) -> bytes:
        about = {"format": "ucp-writer", "version": 1, "into": self.into, "mark": uuid.uuid4().hex}
        return json.dumps(about).encode()

    def _gone(self, why: str) -> StorageError:
        return StorageError(
            f"{self.pool.url}: {why}: the checkpoint was not committed in time",
            hint="save or convert again; --grace of `ucp gc` must be longer than a save may stall",
        )


def look(pool: Store) -> Offer:
    """What the pool offers: first what is doomed, then what is there, so that nothing deleted is ever found.

    Where it cannot be told what is doomed, nothing is shared: a checkpoint is worth more than room.
    """
    try:
        ledger, _ = read_ledger(pool)
    except CorruptError as error:
        _LOG.warning("nothing is shared: %s", error)
        return Offer({}, frozenset(), closed=True)
    doomed = frozenset(ledger.doomed)
    present = {entry.path: entry for entry in pool.entries() if is_name(entry.path)}
    return Offer({name: entry for name, entry in present.items() if name not in doomed}, doomed)


def put_shared(pool: Store, data: Buffer, name: str | None = None) -> str:
    """Put an object into the pool, durably, unless it is there; its name, which may be given if it is known.

    One that is there and damaged is replaced: its name says what its bytes are, and all who need it gain by that.
    """
    name = name or content_name(data)
    try:
        pool.put(name, data, if_absent=True)
        _SOUND.add((pool.url, name, pool.entry(name).fingerprint))
    except ConflictError:
        entry = pool.entry(name)
        if entry.size != len(data) or not _is_sound(pool, entry):
            _LOG.warning("%s/%s: was damaged, and is written again", pool.url, name)
            with suppress(ConflictError):  # by somebody else, too
                pool.put(name, data, if_match=entry.fingerprint)
    return name


__all__ = ["LEASES", "Lease", "Offer", "is_lease", "look", "put_shared"]
