"""Collecting the garbage of a run: shared objects that no checkpoint needs, and what interrupted work has left.

In two phases: a run of `gc` notes what it finds, and only a later one, after the grace period, removes what is still as
it was noted. Why no complete checkpoint can lose anything by it: spec/commit-protocol.md, "Shared objects and garbage".
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ucp.errors import ConflictError, NotFoundError, UsageError
from ucp.format.pool import POOL, is_name, stored_name
from ucp.lifecycle.remains import Remains, Survey, pool_strays, references, remove, survey
from ucp.share.lease import LEASES, is_lease
from ucp.share.ledger import LEDGER, Ledger, Seen, read_ledger, write_ledger
from ucp.share.references import shared_by
from ucp.store import Store, open_store

GRACE = "24h"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

Kind = Literal["shared", "incomplete", "stray", "lease"]


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that is, or will be, removed: its `path` in the run, its bytes, and in how many seconds it may go.

    A `shared` object; an `incomplete` checkpoint, or what an interrupted writer left in a complete one; a `stray` file
    of ours that belongs to nothing; the `lease` of a writer that is no more.
    """

    kind: Kind
    path: str
    nbytes: int
    due: float = 0.0


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection did. With `dry_run`, what it would have done.

    `removed` is gone; `condemned` will go when it is still as it is after the grace period. `complete` are the
    checkpoints of the run, `foreign` what is not ours and was left alone. `waiting` are writers that are being waited
    for before doomed objects go.
    """

    url: str
    dry_run: bool
    removed: tuple[Garbage, ...]
    condemned: tuple[Garbage, ...]
    complete: tuple[str, ...]
    foreign: tuple[str, ...]
    waiting: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that were removed."""
        return sum(one.nbytes for one in self.removed)


def gc(
    url: str, *, grace: str | float = GRACE, dry_run: bool = False, clock: Callable[[], float] = time.time
) -> GcReport:
    """Collect the garbage of the run at `url`, the folder that its checkpoints lie in.

    `grace` is how long something must have been seen unneeded and unchanged before it goes: seconds, or text such as
    ``90m``, ``24h``, ``7d``. It must be longer than any writer may stall. With `dry_run` nothing is changed.

    NotFoundError if there is nothing, UsageError if that is a checkpoint itself, CorruptError or FitError if the root
    object of a checkpoint cannot be read (nothing is removed then), ConflictError while another collection is at work.
    """
    run, seconds = open_store(url), grace_seconds(grace)
    _check_run(run)
    collection = _Collection(run, seconds, clock)
    if dry_run:
        return collection.look()
    with run.exclusive():
        return collection.collect()


def grace_seconds(grace: str | float) -> float:
    """A number of seconds, or text with a unit; UsageError for anything else."""
    if isinstance(grace, str):
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([smhd]?)", grace.strip())
        if found is None:
            raise UsageError(f"{grace!r} is no length of time", hint="for example 90m, 24h or 7d")
        return float(found[1]) * _UNITS[found[2]]
    if isinstance(grace, bool) or not 0 <= grace < float("inf"):
        raise UsageError(f"a grace period of {grace!r} seconds", hint="for example 90m, 24h or 7d")
    return float(grace)


def _check_run(run: Store) -> None:
    if not run.lists:
        raise UsageError(f"{run.url}: cannot be listed", hint="name the run by the URL of its storage")
    if not run.children():
        raise NotFoundError(f"{run.url}: no such folder, or it is empty")
    if shared_by(run) is not None:
        raise UsageError(f"{run.url}: is a checkpoint", hint="name the folder that the checkpoints of the run lie in")


@dataclass(slots=True)
class _Collection:
    """One run of the collector. `ledger` is what it knows, `seen` the fingerprint of the object that says so.

    `before` is what earlier runs knew: only by that anything is ever removed.
    """

    run: Store
    grace: float
    clock: Callable[[], float]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    ledger: Ledger = field(default_factory=Ledger)
    seen: str | None = None
    before: Ledger = field(default_factory=Ledger)
    removed: list[Garbage] = field(default_factory=list)
    waiting: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def pool(self) -> Store:
        """The pool of the run."""
        return self.run.child(POOL)

    def look(self) -> GcReport:
        """What `collect` would do now."""
        self.ledger, self.seen = read_ledger(self.pool)
        self.before = self.ledger
        now = self.clock()
        leases, found, strays, foreign = self._found()
        noted = self._noted(leases, found, strays, now)
        due = {*self.ledger.doomed, *self._due_objects(noted, now)} - found.references
        self.removed = [Garbage("shared", f"{POOL}/{name}", self.sizes[name]) for name in sorted(due & {*self.sizes})]
        self.removed += [_garbage(one) for one in (*found.remains, *strays) if self._is_due(one, now)]
        return self._report(found, foreign, noted, (*found.remains, *strays), now, dry_run=True)

    def collect(self) -> GcReport:
        """Finish what an earlier run began, note what there is, and remove what was noted long enough ago."""
        self.ledger, self.seen = read_ledger(self.pool)
        self.before = self.ledger
        now = self.clock()
        self._finish(now)
        leases, found, strays, foreign = self._found()
        noted, remains = self._noted(leases, found, strays, now), (*found.remains, *strays)
        due = self._due_objects(noted, now)
        if due and not self.ledger.doomed:
            noted = replace(noted, doomed=due, doomed_at=now, waiting=None, collector=self.name)
        self._write(noted)
        self._finish(now)
        gone = [one for one in remains if self._is_due(one, now) and remove(self.run, one)]
        self.removed += map(_garbage, gone)
        ended = self._end_leases(now)
        paths = {one.path for one in gone}
        self._write(
            replace(
                self.ledger,
                remains={path: since for path, since in self.ledger.remains.items() if path not in paths},
                leases={name: since for name, since in self.ledger.leases.items() if name not in ended},
            )
        )
        left = tuple(one for one in remains if one.path not in paths)
        return self._report(found, foreign, self.ledger, left, now, dry_run=False)

    def _found(self) -> tuple[dict[str, str], Survey, list[Remains], list[str]]:
        """Leases first, then roots: a writer that has released its lease by now has put its root before."""
        leases = self._leases()
        self.sizes = {entry.path: entry.size for entry in self.pool.entries() if is_name(entry.path)}
        found = survey(self.run)
        strays, foreign = pool_strays(self.pool)
        return leases, found, strays, foreign

    def _leases(self) -> dict[str, str]:
        entries = (entry for entry in self.pool.entries(LEASES) if is_lease(entry.path))
        return {entry.path.removeprefix(LEASES): entry.fingerprint for entry in entries}

    def _noted(self, leases: Mapping[str, str], found: Survey, strays: list[Remains], now: float) -> Ledger:
        """What is known after this look, with the times of before where nothing has changed."""
        before = self.ledger
        unreferenced = {
            name: min(before.unreferenced.get(name, now), now) for name in self.sizes if name not in found.references
        }
        remains = {one.path: one.fingerprint for one in (*found.remains, *strays)}
        return replace(
            before,
            unreferenced=unreferenced,
            leases=_since(before.leases, leases, now),
            remains=_since(before.remains, remains, now),
        )

    def _due_objects(self, noted: Ledger, now: float) -> tuple[str, ...]:
        """Objects that no checkpoint needs now, nor did when an earlier run looked, so long ago."""
        before = self.ledger.unreferenced
        return tuple(sorted(n for n, since in noted.unreferenced.items() if n in before and now - since >= self.grace))

    def _is_due(self, one: Remains, now: float) -> bool:
        return _has_stayed(self.before.remains.get(one.path), one.fingerprint, now, self.grace)

    def _finish(self, now: float) -> None:
        """Delete doomed objects once all writers that may have found them before are done, and what they need is known.

        A writer that begins later sees that they are doomed, and uses none of them.
        """
        if not self.ledger.doomed or self._is_another_at_work(now):
            return
        leases = self._leases()
        if self.ledger.waiting is None or self.ledger.collector != self.name:
            waiting = tuple(sorted(leases)) if self.ledger.waiting is None else self.ledger.waiting
            self._write(replace(self.ledger, waiting=waiting, collector=self.name))
        self.waiting = self._alive(leases, now)
        if self.waiting:
            return
        needed = references(self.run)
        for name in self.ledger.doomed:
            size = self.sizes.get(name, 0) or self._size(name)
            if name in needed or not self._is_shared(name, size):
                continue
            self._check_mine()
            self.pool.delete(name)
            self.removed.append(Garbage("shared", f"{POOL}/{name}", size))
        left = {name: since for name, since in self.ledger.unreferenced.items() if name not in self.ledger.doomed}
        self._write(replace(self.ledger, unreferenced=left, doomed=(), doomed_at=0.0, waiting=None))

    def _is_another_at_work(self, now: float) -> bool:
        """Whether another collector may be deleting right now; where the store locks, none can be."""
        if self.ledger.collector == self.name or self.run.locks:
            return False
        if self.ledger.doomed_at > now:  # by a clock that is ahead: its time counts from now on
            self._write(replace(self.ledger, doomed_at=now))
        return now - self.ledger.doomed_at < self.grace

    def _alive(self, leases: Mapping[str, str], now: float) -> tuple[str, ...]:
        """The writers to be waited for. One that is taken for dead is told so first, and may object."""
        waiting = [name for name in self.ledger.waiting or () if name in leases]
        dead = {name for name in waiting if _has_stayed(self.before.leases.get(name), leases[name], now, self.grace)}
        if dead:
            self._write(replace(self.ledger, waiting=tuple(name for name in waiting if name not in dead)))
            again = self._leases()
            dead = {name for name in dead if again.get(name, leases[name]) == leases[name]}
        alive = tuple(name for name in waiting if name not in dead)
        if alive != self.ledger.waiting:
            self._write(replace(self.ledger, waiting=alive))
        return alive

    def _is_shared(self, name: str, size: int) -> bool:
        """Whether an object is named by its content as ours are: others keep files under digests of other kinds."""
        try:
            return stored_name(self.pool, name, size) == name
        except NotFoundError:
            return True

    def _size(self, name: str) -> int:
        try:
            return self.pool.entry(name).size
        except NotFoundError:
            return 0

    def _end_leases(self, now: float) -> set[str]:
        """Delete leases that nobody has renewed for the grace period."""
        ended = set()
        for name, fingerprint in self._leases().items():
            if _has_stayed(self.before.leases.get(name), fingerprint, now, self.grace):
                self.pool.delete(f"{LEASES}{name}")
                self.removed.append(Garbage("lease", f"{POOL}/{LEASES}{name}", 0))
                ended.add(name)
        return ended

    def _write(self, ledger: Ledger) -> None:
        if ledger == self.ledger:
            return
        self.seen = write_ledger(self.pool, ledger, self.seen)
        self.ledger = ledger

    def _check_mine(self) -> None:
        """ConflictError if another collector has taken over meanwhile."""
        if not self.run.locks and self.pool.entry(LEDGER).fingerprint != self.seen:
            raise ConflictError(f"{self.pool.url}: another `ucp gc` has taken over", hint="let it end")

    def _report(
        self, found: Survey, foreign: list[str], noted: Ledger, left: tuple[Remains, ...], now: float, *, dry_run: bool
    ) -> GcReport:
        gone = {one.path for one in self.removed}
        condemned = [
            Garbage("shared", f"{POOL}/{name}", self.sizes.get(name, 0), max(0.0, since + self.grace - now))
            for name, since in sorted(noted.unreferenced.items())
        ]
        condemned += [
            replace(_garbage(one), due=max(0.0, noted.remains[one.path][1] + self.grace - now))
            for one in left
            if one.path in noted.remains
        ]
        condemned = [one for one in condemned if one.path not in gone]
        return GcReport(
            self.run.url,
            dry_run,
            tuple(self.removed),
            tuple(condemned),
            found.complete,
            (*found.foreign, *foreign),
            self.waiting,
        )


def _since(before: Mapping[str, Seen], found: Mapping[str, str], now: float) -> dict[str, Seen]:
    return {
        name: (mark, min(before[name][1], now)) if name in before and before[name][0] == mark else (mark, now)
        for name, mark in found.items()
    }


def _has_stayed(seen: Seen | None, fingerprint: str, now: float, grace: float) -> bool:
    """Whether an earlier run saw it as it is, so long ago."""
    return seen is not None and seen[0] == fingerprint and now - seen[1] >= grace


def _garbage(one: Remains) -> Garbage:
    return Garbage("incomplete" if one.path.endswith("/") else "stray", one.path, one.nbytes)


__all__ = ["GRACE", "Garbage", "GcReport", "gc", "grace_seconds"]
