"""Mirror the folder of a run: every complete checkpoint that the other place lacks, with its record, the newest first.

Newest first, because a mirror that is cut short then has what matters most, and because retention, which may be at work
on the source meanwhile, deletes the oldest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ucp.errors import ConflictError, ContentError, NotFoundError, UsageError
from ucp.lifecycle.contents import read_contents
from ucp.lifecycle.copy import How, copy_contents
from ucp.lifecycle.mend import mend
from ucp.lifecycle.shelf import ROOTS, Contents, Shelf, folder_name, remove_folder
from ucp.lifecycle.stream import OnProgress
from ucp.lifecycle.whole import check_whole
from ucp.run.claim import claim_of, withdraw
from ucp.run.destination import refuse_overlap
from ucp.store import open_store


@dataclass(slots=True)
class SyncReport:
    """What a sync did, by step. `vanished` were deleted at the source while they were copied; `present` lay there.

    `replaced` are those of `copied` that were another checkpoint of the same step before, `mended` those that were
    there, and had lost objects since or, where everything was read, held damaged ones.
    """

    source: str
    destination: str
    copied: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    mended: list[int] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    vanished: list[int] = field(default_factory=list)
    objects: int = 0
    resumed_objects: int = 0
    bytes_copied: int = 0
    bytes_verified: int = 0
    seconds: float = 0.0


def sync(
    source: str,
    destination: str,
    *,
    delete: bool = False,
    verify: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> SyncReport:
    """Copy the complete checkpoints of the run folder `source` that the one at `destination` lacks, newest first.

    Each is copied as `ucp.copy` does it, with its record (``step-….json``), and resumed if it was cut short; `verify`
    reads all of them back, those that were there before too. What one that was there before has lost since, and with
    `verify` what is damaged of it, is copied again. With `delete`, what `source` has no more is deleted at
    `destination` afterwards, its root first, and a checkpoint that is another one at `source` now is replaced.
    What replaces another one is verified whole before that is removed. A damaged checkpoint is passed over, and raised
    when the others are copied; nothing is deleted then. Incomplete checkpoints are passed over. One sync at a time may
    write to `destination`, and nobody else.

    UsageError where the folders overlap or `source` is no run; ConflictError, after everything else is copied, where a
    step is another checkpoint at the two places; what `ucp.copy` raises.
    """
    mirror = _Mirror(Shelf(source), Shelf(destination), How(verify=verify, workers=workers, on_progress=on_progress))
    refuse_overlap(mirror.source.store, mirror.destination.store)
    start = time.perf_counter()
    with mirror.destination.store.exclusive():
        mirror.tidy()
        differing = mirror.copy_all(replace=delete)
        if delete:
            mirror.delete_others()
    mirror.report.seconds = time.perf_counter() - start
    if differing:
        steps = " ".join(map(folder_name, differing))
        raise ConflictError(
            f"{destination}: {steps} is another checkpoint than at {source}",
            hint="--delete makes the destination like the source",
        )
    return mirror.report


class _Mirror:
    """Two folders of a run, and what was done so far."""

    def __init__(self, source: Shelf, destination: Shelf, how: How) -> None:
        self.source, self.destination, self.how = source, destination, how
        self.report = SyncReport(source.store.url, destination.store.url)
        self.held = source.contents()
        if not self.held.saved:
            raise NotFoundError(
                f"{source.address}: holds no complete checkpoint of a run", hint="give the folder with step-… in it"
            )

    def copy_all(self, *, replace: bool) -> list[int]:
        """Copy what is missing; the steps that are another checkpoint there and may not be replaced."""
        there = self.destination.contents()
        differing: list[int] = []
        damaged: list[ContentError | NotFoundError] = []
        for saved in reversed(self.held.saved):
            try:
                if not self._one(saved.step, there, replace=replace):
                    differing.append(saved.step)
            except (ContentError, NotFoundError) as error:
                if self.source.complete(saved.step):
                    damaged.append(error)
                else:
                    self._give_up(saved.step)
        if damaged:
            raise damaged[0]
        return differing

    def tidy(self) -> None:
        """Remove what records that were cut short have left."""
        for path in self.destination.strays(10**18):
            if not path.endswith(".json"):
                self.destination.store.delete(path)

    def delete_others(self) -> None:
        """Delete what the source has no more."""
        keep = {saved.step for saved in self.held.saved}
        there = self.destination.contents()
        ours = {*(saved.step for saved in there.saved), *there.incomplete} - there.others
        for step in sorted(ours - keep):
            self.destination.remove(step)
            self.report.deleted.append(step)
        for path in self.destination.strays(10**18):
            self.destination.store.delete(path)

    def _one(self, step: int, there: Contents, *, replace: bool) -> bool:
        """Copy one checkpoint, or see that it is there; False where another one is."""
        complete = any(saved.step == step for saved in there.saved)
        if complete and not self._same(step):
            read_contents(self.source.where(step))  # a damaged source is told as such, and not as another checkpoint
            if not replace:
                return False
            check_whole(self.source.where(step), workers=self.how.workers)
            self.destination.remove(step)
            self.report.replaced.append(step)
            complete = False
        if step in there.incomplete:
            self._clear_remains(step, there)
        self._record(step)
        if complete:
            self._look_after(step)
            return True
        how = How(verify=self.how.verify, restart=True, workers=self.how.workers, on_progress=self.how.on_progress)
        done = copy_contents(
            read_contents(self.source.where(step), pooled=True), open_store(self.destination.where(step)), how
        )
        self.report.copied.append(step)
        self.report.objects += done.objects
        self.report.resumed_objects += done.resumed_objects
        self.report.bytes_copied += done.bytes_copied
        self.report.bytes_verified += done.bytes_verified
        return True

    def _look_after(self, step: int) -> None:
        """A checkpoint that is there: it is, if nothing of it is missing or, where that is asked, damaged."""
        store = open_store(self.destination.where(step))
        moved = mend(read_contents(self.source.where(step), pooled=True), store, self.how)
        withdraw(store)
        if moved.copied:
            self.report.copied.append(step)
            self.report.mended.append(step)
        else:
            self.report.present.append(step)
        self.report.bytes_copied += moved.copied
        self.report.bytes_verified += moved.verified

    def _same(self, step: int) -> bool:
        """Whether the roots of both are equal: they name everything else with its digest."""
        return _root(self.source, step) == _root(self.destination, step)

    def _clear_remains(self, step: int, there: Contents) -> None:
        """Remove what a deletion that was cut short left; a copy that was cut short is gone on with."""
        store = open_store(self.destination.where(step))
        if claim_of(store) is not None:
            return
        if step in there.others:
            raise UsageError(
                f"{store.url}: holds files that are no checkpoint, and no record of one",
                hint="remove them, or choose another destination",
            )
        remove_folder(self.destination.store, folder_name(step))

    def _record(self, step: int) -> None:
        """The record goes first, so that no complete checkpoint lacks its metrics, and remains are known as ours."""
        saved, path = self.source.saved(step), f"{folder_name(step)}.json"
        if self.source.store.exists(path):
            data = self.source.store.read(path)
            if not self.destination.store.exists(path) or self.destination.store.read(path) != data:
                self.destination.store.put(path, data)
        else:
            self.destination.record(step, saved.metrics, aside=saved.aside)

    def _give_up(self, step: int) -> None:
        """The checkpoint went away at the source while it was copied; one that is complete stays."""
        if not self.destination.complete(step):
            self.destination.remove(step)
        self.report.vanished.append(step)


def _root(shelf: Shelf, step: int) -> dict[str, bytes]:
    """The roots of a step by their paths."""
    paths = [f"{folder_name(step)}/{root}" for root in ROOTS]
    return {path: shelf.store.read(path) for path in paths if shelf.store.exists(path)}


__all__ = ["SyncReport", "sync"]
