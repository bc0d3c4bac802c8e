"""The watcher: one pass over a prefix, and passes for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ucp.errors import ConflictError, InterruptedRunError, NotFoundError, StorageError, UsageError
from ucp.lifecycle.shelf import ROOTS
from ucp.pipeline import control, leases
from ucp.pipeline.control import natural
from ucp.pipeline.events import Event, Outcome, failure_in, failure_of
from ucp.pipeline.leases import Lease
from ucp.pipeline.make import Making, make, seen_of
from ucp.pipeline.pointer import Pointer
from ucp.pipeline.prune import Pruning, prune, sweep
from ucp.pipeline.records import Record, Records, is_there
from ucp.pipeline.settings import Settings
from ucp.run.destination import refuse_overlap
from ucp.run.progress import Progress
from ucp.store import open_store

_LOOKED_AT = 8
"""Of how many of the newest results a pass asks whether their root object is still there."""
_FIRST_RETRY_SECONDS = 60.0
_LAST_RETRY_SECONDS = 3600.0


def _nothing(_: object) -> None:
    return None


class Watch:
    """A watcher. `on_event` and `on_progress` are told what it does; the latter often.

    UsageError where the prefixes overlap, or the destination belongs to a pipeline with another source or family.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_event: Callable[[Event], None] = _nothing,
        on_progress: Callable[[Progress], None] = _nothing,
    ) -> None:
        self.settings, self._tell, self._on_progress = settings, on_event, on_progress
        self._source, self._store = open_store(settings.source), open_store(settings.destination)
        refuse_overlap(self._source, self._store)
        self._records = Records(self._store)
        self._pointer = Pointer(self._store, settings.pointer)
        self._passed_over: dict[str, str] = {}
        self._agreed = False

    @property
    def urls(self) -> tuple[str, str]:
        """The two prefixes, as they may be printed."""
        return self._source.url, self._store.url

    def run(self, *, every: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Pass after pass, `every` so many seconds; storage failures of a pass are told, and the next one goes on."""
        while True:
            try:
                self.once()
            except StorageError as error:
                self._tell(Event("failed", "", failure_of("", error, 1, every).detail))
            sleep(every)

    def once(self) -> Outcome:
        """One pass: convert and verify what is new, newest first, publish, prune; nothing if nothing is new.

        Raises StorageError where the prefixes cannot be listed, UsageError for a source that is a checkpoint itself;
        what is wrong with one checkpoint is in the outcome.
        """
        if not self._agreed:
            self._check_prefix()
            control.agree(
                self._store, {"source": self._source.url, "to": str(self.settings.options.get("to", "universal"))}
            )
            control.tidy(self._store, self._pointer.path)
            self._agreed = True
        outcome = Outcome()
        sources = self._sources()
        records = self._still_there(self._records.all(), sources)
        names = sorted({*sources, *records}, key=natural, reverse=True)
        for name in names:
            if len(outcome.kept) == self.settings.keep:
                break
            look = len(outcome.kept) < _LOOKED_AT
            if self._keeps(name, records.get(name), look=look) or (name in sources and self._makes(name, outcome)):
                outcome.kept.append(name)
        self._publish(outcome)
        self._prune(outcome)
        leases.tidy(self._store, self.settings.lease)
        outcome.published, _ = self._pointer.read()
        return outcome

    def _check_prefix(self) -> None:
        if any(self._source.exists(root) for root in ROOTS):
            raise UsageError(f"{self._source.url}: is a checkpoint", hint="name the folder that it lies in")

    def _sources(self) -> set[str]:
        """Folders of the source that may be checkpoints."""
        taken = self.settings.pointer.partition("/")[0]
        names = {name[:-1] for name in self._source.children() if name.endswith("/") and not name.startswith(".")}
        ready = self.settings.ready
        return {name for name in names - {taken} if ready is None or self._source.child(name).exists(ready)}

    def _still_there(self, records: Mapping[str, Record], sources: Collection[str]) -> dict[str, Record]:
        """`records` without those of results that somebody has deleted and sources that have gone, to be forgotten."""
        folders = {name.rstrip("/") for name in self._store.children()}
        kept = {name for name, record in records.items() if name in (folders if record.made else sources)}
        for name in records.keys() - kept:
            self._records.remove(name)
        return {name: records[name] for name in kept}

    def _keeps(self, name: str, record: Record | None, *, look: bool) -> bool:
        """Whether a result is there and verified; one that was to be removed is kept after all, if it is whole.

        What is left of one that is not is removed.
        """
        if record is None or not record.made:
            return False
        if record.state == "verified" and not look:
            return True
        if record.state != "damaged" and is_there(self._store, record.about, name):
            return record.state == "verified" or self._records.change(record.as_state("verified"), was=record)
        sweep(self._pruning, record)
        return False

    @property
    def _pruning(self) -> Pruning:
        def tell(kind: str, name: str) -> None:
            self._tell(Event(kind, name))

        settings = self.settings
        return Pruning(self._store, self._records, self._pointer, settings.grace, settings.lease, tell)

    def _makes(self, name: str, outcome: Outcome) -> bool:
        """Convert and verify a source, and publish it if it is the newest; whether that worked."""
        seen = seen_of(self._source.child(name))
        known = self._records.one(name)
        if self._passed_over.get(name) == seen:
            outcome.incomplete.append(name)
        elif known is not None and known.state == "failed" and known.seen == seen and known.since > time.time():
            outcome.failed.append(failure_in(known))
        elif (lease := leases.take(self._store, name, self.settings.lease)) is not None:
            try:
                return self._tries(name, seen, lease, outcome)
            finally:
                lease.release()
        else:
            self._is_busy(name, outcome)
        return False

    def _tries(self, name: str, seen: str, lease: Lease, outcome: Outcome) -> bool:
        try:
            known = self._records.one(name)
            if known is not None and known.state == "verified":
                return True  # another watcher has just made it
            made = make(self._making(name, seen, lease), was=known, records=self._records)
        except NotFoundError as error:
            self._passed_over[name] = seen
            outcome.incomplete.append(name)
            self._tell(Event("incomplete", name, {"message": error.message}))
            return False
        except InterruptedRunError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever one checkpoint does, the others go on
            self._fail(name, seen, error, outcome)
            return False
        if made is None:
            self._is_busy(name, outcome)
            return False
        self._tell(Event("verified", name, made.about))
        self._announce(made)
        return True

    def _is_busy(self, name: str, outcome: Outcome) -> None:
        outcome.busy.append(name)
        self._tell(Event("busy", name))

    def _making(self, name: str, seen: str, lease: Lease) -> Making:
        def on_progress(progress: Progress) -> None:
            lease.renew()
            self._on_progress(progress)

        def tell(kind: str, about: Mapping[str, Any]) -> None:
            self._tell(Event(kind, name, about))

        return Making(self.settings, name, seen, self._store, lease, tell, on_progress)

    def _fail(self, name: str, seen: str, error: Exception, outcome: Outcome) -> None:
        """Tell a failure. Those of storage and of others at work pass; the rest is noted, and tried again later."""
        if isinstance(error, ConflictError) and self._is_written(name):
            self._is_busy(name, outcome)
            return
        known = self._records.one(name)
        attempts = 1 + (known.about.get("attempts", 0) if known is not None and known.seen == seen else 0)
        wait = min(_LAST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2 ** min(attempts - 1, 16))
        lasting = not isinstance(error, StorageError)
        failure = failure_of(name, error, attempts if lasting else 1, wait if lasting else 0.0)
        if lasting:
            about = {key: value for key, value in failure.detail.items() if key != "retry_in"}
            self._records.change(Record(name, "failed", about, time.time() + wait, seen), was=known)
        outcome.failed.append(failure)
        self._tell(Event("failed", name, failure.detail))

    def _is_written(self, name: str) -> bool:
        """Whether another process is writing the result."""
        folder = self._store.child(name)
        try:
            with folder.exclusive():
                return False
        except ConflictError:
            return True

    def _announce(self, record: Record) -> None:
        changed = self._pointer.publish(record, self._records)
        if changed is not None:
            self._tell(Event("published", changed.name, changed.about))

    def _publish(self, outcome: Outcome) -> None:
        """Have the pointer name the newest, also where what it named has vanished."""
        newest = self._records.one(outcome.kept[0]) if outcome.kept else None
        if newest is not None and newest.state == "verified":
            self._announce(newest)

    def _prune(self, outcome: Outcome) -> None:
        """Remove what is older than all that is kept."""
        if self.settings.keep is None or len(outcome.kept) < self.settings.keep:
            return
        oldest = natural(outcome.kept[-1])
        old = [record for record in self._records.all().values() if record.made and natural(record.name) < oldest]
        for record in sorted(old, key=lambda record: natural(record.name)):
            prune(self._pruning, record)
