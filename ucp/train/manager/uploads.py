"""Complete checkpoints of a run follow to a second folder, behind the training's back; rank 0 does it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from ucp.converter import read_catalog
from ucp.errors import ContentError, NotFoundError, StorageError, UcpError, UsageError
from ucp.lifecycle.contents import read_contents
from ucp.lifecycle.copy import How, copy_contents
from ucp.lifecycle.shelf import Contents, Saved, Shelf
from ucp.lifecycle.whole import check_whole
from ucp.store import open_store
from ucp.train.manager.janitor import Janitor
from ucp.train.manager.keep import Keep
from ucp.train.manager.tiers import Tiers

_log = logging.getLogger("ucp")
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LAST_TRIES = 3


class Uploads(Janitor):
    """Copies what is complete in the fast folder of `tiers` to the far one, and deletes in each what may go.

    The newest first, and only what `keep` keeps. In the fast folder the `near` newest stay, and what is not copied yet.
    What fails is logged and tried again, after a while or with the next checkpoint, and after a restart of the job.
    What is to replace another checkpoint in the far folder is read and verified before that is removed.
    """

    def __init__(self, tiers: Tiers, keep: Keep, near: int, *, grace: float | None = None) -> None:
        super().__init__(tiers, keep, grace=grace)
        self.tiers, self.near = tiers, near
        self._newest = -1
        self._work, self._closing, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._runner: threading.Thread | None = None
        self._failed: UcpError | None = None
        self._damaged: dict[int, UcpError] = {}
        self._outranked: set[int] = set()

    def committed(self, step: int) -> None:
        """The checkpoint of `step` is complete in the fast folder."""
        self._newest = max(self._newest, step)
        self._damaged.pop(step, None)
        self.begin()

    def begin(self) -> None:
        """Look, in the background, what there is to copy; an earlier job may have left some."""
        self._work.set()
        if self._runner is None:
            self._closing.clear()
            # A daemon: what it was copying when the process ends is taken up again by the next one.
            self._runner = threading.Thread(target=self._run, name="ucp-upload", daemon=True)
            self._runner.start()

    def pending(self) -> list[Saved]:
        """What is complete in the fast folder, to be kept, and not in the far one; the newest first."""
        near, far = self.tiers.near(), self.tiers.far.contents()
        there = {one.step: one for one in far.saved}
        gone = self._expendable(near, far)
        wanted = (one for one in reversed(near.live) if one.step not in gone)
        return [one for one in wanted if one.step not in there or not self._is_there(one, there[one.step])]

    def close(self) -> None:
        """Copy what there is to copy; StorageError, naming what could not be, after a few tries."""
        super().close()
        runner, self._runner = self._runner, None
        if runner is None:
            return
        self._closing.set()
        self._work.set()
        runner.join()
        left = [self._failed] if self._failed is not None else [*self._damaged.values()]
        if left:
            raise StorageError(
                f"{self.tiers.far.address}: not everything could be copied there: {left[0]}",
                hint=f"it lies in {self.tiers.address}; the next run goes on, and so does "
                f"`ucp sync {self.tiers.address} {self.tiers.far.address}`",
            )

    def dismiss(self, *, wait: bool = False) -> None:
        super().dismiss(wait=wait)
        if not wait:
            self._stop.set()
            self._work.set()

    def _run(self) -> None:
        wait, tries = _FIRST_WAIT, _LAST_TRIES
        self._work.wait()
        while not self._stop.is_set():
            self._work.clear()
            self._failed = self._pass()
            if self._closing.is_set():
                tries -= 1
                if not tries or (self._failed is None and not self._work.is_set()):
                    return
                self._stop.wait(0.0 if self._failed is None else _FIRST_WAIT)
                continue
            wait = _FIRST_WAIT if self._failed is None else min(_LONGEST_WAIT, 2 * wait)
            self._work.wait(None if self._failed is None else wait)

    def _pass(self) -> UcpError | None:
        """Copy everything that is to be copied, then delete what may go; what went wrong, if anything."""
        try:
            while waiting := [one for one in self.pending() if one.step not in self._damaged]:
                self._upload(waiting[0])
                if self._stop.is_set():
                    return None
            self._sweep()
        except UcpError as error:
            _log.warning("%s: not copied yet, and tried again: %s", self.tiers.far.address, error)
            return error
        except Exception as error:  # noqa: BLE001  training does not end because of it
            _log.warning("%s: not copied yet, and tried again", self.tiers.far.address, exc_info=True)
            return StorageError(f"{type(error).__name__}: {error}")
        return None

    def _upload(self, saved: Saved) -> None:
        far = self.tiers.far
        try:
            if far.complete(saved.step):  # another one, of a history that was given up
                check_whole(saved.url)
                far.remove(saved.step)
            far.record(saved.step, saved.metrics, aside=saved.aside)
            copy_contents(read_contents(saved.url, pooled=True), open_store(far.where(saved.step)), How(restart=True))
        except (ContentError, NotFoundError) as error:
            if saved.step in {one.step for one in self.tiers.near().live}:
                _log.warning("%s cannot be copied: %s", saved.url, error)
                self._damaged[saved.step] = error
            elif not far.complete(saved.step):
                far.remove(saved.step)  # it was deleted here while it was copied

    def _is_there(self, near: Saved, far: Saved) -> bool:
        """Whether the far folder holds the checkpoint already, or the only one of the two whose root can be read."""
        if self.tiers.is_same(near.step):
            return True
        if far.aside or (damage := _unreadable(near.url)) is None or _unreadable(far.url) is not None:
            return False
        if near.step not in self._outranked:
            self._outranked.add(near.step)
            hint = f"`ucp repair {near.url} --from {far.url}` may put it right"
            _log.warning("%s is damaged, and does not replace %s: %s; %s", near.url, far.url, damage, hint)
        return True

    def _sweep(self) -> None:
        """Make the records of both folders agree; then delete in each what may go."""
        tiers, newest = self.tiers, self._newest
        near, far = tiers.near(), tiers.far.contents()
        there = {one.step: one for one in far.saved}
        for one in near.saved:
            if one.step in there and there[one.step].aside != one.aside and tiers.is_same(one.step):
                tiers.far.record(one.step, one.metrics, aside=one.aside)
        gone = self._expendable(near, far)
        for step in gone:
            tiers.remove(step)
        for step in self._needless(near.live, there.keys() - gone - self._damaged.keys()):
            Shelf.remove(tiers, step)
        for step in near.incomplete:
            if step < newest and step not in near.others:
                Shelf.remove(tiers, step)
        here = {one.step for one in near.saved}
        for step in far.incomplete:
            if step < newest and step not in here and step not in far.others:
                tiers.far.remove(step)
        if self.grace is not None:
            for shelf in (tiers, tiers.far):
                self._collect(shelf, self.grace)

    def _expendable(self, near: Contents, far: Contents) -> set[int]:
        """Steps that retention lets go, in both folders."""
        both = {one.step: one for one in (*far.saved, *near.saved)}
        return {*self.keep.expendable(tuple(both.values()), newest=self._newest)}

    def _needless(self, live: Sequence[Saved], there: set[int]) -> list[int]:
        """Steps that the fast folder needs no more: they are in the far one, and others are newer."""
        older = [one.step for one in live][: -self.near or None]
        return [step for step in older if step in there and step < self._newest]


def places(
    url: str, keep: Keep, *, upload: str | None, near: int | None, grace: float | None = None
) -> tuple[Shelf, Janitor]:
    """The folder of a run, or its two, and who deletes and copies there; `near` (2) is how many stay at `url`.

    With a `grace` period what checkpoints have shared that are gone is collected.

    UsageError for options that make no sense together.
    """
    if upload is not None:
        if near is not None and near < 1:
            raise UsageError(f"keep_local={near}: must be at least 1")
        tiers = Tiers(url, upload)
        return tiers, Uploads(tiers, keep, 2 if near is None else near, grace=grace)
    if near is not None:
        raise UsageError("keep_local says what stays beside what is uploaded", hint="give upload too")
    shelf = Shelf(url)
    return shelf, Janitor(shelf, keep, grace=grace)


def _unreadable(url: str) -> UcpError | None:
    """What is wrong with the root of a checkpoint."""
    try:
        read_catalog(url)
    except (ContentError, NotFoundError) as error:
        return error
    return None
