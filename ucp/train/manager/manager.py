"""`ucp.CheckpointManager`: one call per step saves what is due, keeps what is worth it and heeds preemption."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from ucp.errors import UcpError, UsageError
from ucp.lifecycle.gc import GRACE, grace_seconds
from ucp.lifecycle.shelf import Contents, Saved
from ucp.train.load import load
from ucp.train.manager.history import History
from ucp.train.manager.keep import Best, Keep, Mode
from ucp.train.manager.preempt import Preemption, Signal
from ucp.train.manager.ranks import Ranks, Word
from ucp.train.manager.resume import Resumed, candidates, resume
from ucp.train.manager.tiers import Tiers
from ucp.train.manager.uploads import Uploads, places
from ucp.train.save import SaveHandle, async_save

_log = logging.getLogger("ucp")


@dataclass(frozen=True, slots=True)
class _Flight:
    """A save under way; `before` is the newest step that was saved when it began."""

    step: int
    handle: SaveHandle
    before: int | None


class CheckpointManager:
    """The checkpoints of one run, in the folder `url`: ``step-00001000`` and so on, each one complete or none at all.

    >>> with ucp.CheckpointManager(url, every=1000, keep_latest=3, best=("loss", "min")) as manager:  # doctest: +SKIP
    ...     resumed = manager.resume((model, optimizer))
    ...     for step in range(resumed.step + 1 if resumed else 1, steps + 1):
    ...         loss = train_step(model, optimizer)
    ...         manager.step(step, (model, optimizer), metrics={"loss": loss})
    ...         if manager.preempted:
    ...             break

    `every` steps there is a save, in the background: `step` returns when the state may change again. One save at most
    is under way. When the next is due before it ended, ``busy="wait"`` waits for it and ``busy="skip"`` goes on without
    the next. A save that failed in the background raises from the next call, on all ranks at the same step; with
    ``on_error="warn"`` it is logged and training goes on.

    `keep_latest` newest ones are kept, and those of steps that are multiples of `keep_every`, and the `keep_best` best
    by `best`, a pair of a metric's name and ``"min"`` or ``"max"``. Others are deleted by rank 0 in the background,
    once a newer one is committed; so is what an interrupted save or deletion left. Without `keep_latest` nothing is.

    With `upload`, the URL of another folder, complete checkpoints are copied there in the background by rank 0, and
    resumed from where `url` has none or a damaged one: `url` may then be a fast disk. Of what is copied, the
    `keep_local` (2) newest stay at `url`, and what is kept is kept at `upload`. All ranks must see the same `url`.

    `preempt` are signals that announce the end of the job, heard from the first `resume`, `step` or `save` until
    `close`. When any rank got one, all save at the same step, in the foreground, and `preempted` is true from then on.

    With `share` the checkpoints store once what does not change from one to the next (`ucp.save`). Of what they shared,
    and no kept one needs, the retention gets rid when it has been so for `grace` (`ucp.gc`).

    All ranks make the manager with the same arguments and call `resume`, `step` and `save` alike. `options` are those
    of `ucp.async_save`, such as ``form="universal"``. Nobody else may save below `url` at the same time.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep_latest: int | None = None,
        keep_every: int | None = None,
        best: tuple[str, Mode] | None = None,
        keep_best: int = 1,
        upload: str | os.PathLike[str] | None = None,
        keep_local: int | None = None,
        share: bool = False,
        grace: str | float = GRACE,
        busy: Literal["wait", "skip"] = "wait",
        on_error: Literal["raise", "warn"] = "raise",
        preempt: Iterable[Signal] = ("SIGTERM",),
        **options: Any,
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"every={every}: must be at least 1")
        if busy not in ("wait", "skip") or on_error not in ("raise", "warn"):
            raise UsageError(
                f"busy={busy!r}, on_error={on_error!r}", hint='busy="wait" or "skip", on_error="raise" or "warn"'
            )
        self.every, self.busy, self.on_error = every, busy, on_error
        self.options = options | ({"share": True} if share else {})
        self.keep = Keep(keep_latest, keep_every, None if best is None else Best(*best, keep_best))
        self.preempted = False
        """Whether the job is being ended and its state is saved: time to leave the loop."""
        self._shelf, self._janitor = places(
            os.fspath(url),
            self.keep,
            upload=None if upload is None else os.fspath(upload),
            near=keep_local,
            grace=grace_seconds(grace) if share else None,
        )
        self._signals = Preemption(preempt)
        self._flight: _Flight | None = None
        self._told: _Flight | None = None
        self._history: History | None = None
        self._checked = False
        self._ranks_made: Ranks | None = None

    @property
    def url(self) -> str:
        """Folder of the run."""
        return self._shelf.address

    @property
    def saved(self) -> list[Saved]:
        """The complete checkpoints of the run by step, as they lie there now; any process may ask."""
        return list(self._shelf.contents().live)

    @property
    def latest(self) -> Saved | None:
        """The newest complete checkpoint."""
        return next(reversed(self.saved), None)

    @property
    def best(self) -> Saved | None:
        """The best complete checkpoint by the metric given as `best`; of equals the newest."""
        if self.keep.best is None:
            raise UsageError("no metric says which checkpoint is best", hint='give best=("loss", "min")')
        return next(iter(self.keep.best.ranked(self.saved)), None)

    @property
    def newest(self) -> int | None:
        """The newest step of this run that is saved or being saved, as far as this rank knows; the same on all."""
        return None if self._history is None else self._history.newest

    @property
    def incomplete(self) -> list[str]:
        """URLs of folders that are no checkpoint: a save that is under way or was cut short, a deletion cut short."""
        return [self._shelf.where(step) for step in self._shelf.contents().incomplete]

    @property
    def not_uploaded(self) -> list[Saved]:
        """Complete checkpoints that are to be copied to `upload` and are not there yet, the newest first."""
        return self._janitor.pending() if isinstance(self._janitor, Uploads) else []

    def resume(
        self, state: Any, *, step: int | None = None, damaged: Literal["error", "older"] = "error", **options: Any
    ) -> Resumed | None:
        """Fill `state` from the newest complete checkpoint, or that of `step`; None where there is none: a new run.

        Rank 0 says which; all ranks take the same. Incomplete ones are never taken; the result and the log name them.
        If the newest one is damaged, all ranks raise what is wrong with it (CorruptError, ConflictError), unless
        ``damaged="older"`` allows to go on from the one before. Newer ones than the one taken are put aside: no longer
        resumed from, best or kept, and replaced when the run reaches their steps. `options` are those of `ucp.load`.

        NotFoundError where `step` is not there or incomplete, FitError where `state` does not fit.
        """
        if damaged not in ("error", "older"):
            raise UsageError(f"damaged={damaged!r}", hint='"error" or "older"')
        self._settle()
        self._signals.install()
        ranks = self._ranks
        self._check_tiers()
        contents = ranks.decide(lambda: self._janitor.ask(self._shelf.contents))
        found = resume(
            self._shelf, ranks, contents, lambda url: load(state, url, **options), step=step, older=damaged == "older"
        )
        ranks.decide(lambda: self._put_aside(contents, None if found is None else found.step))
        self._history = History.after(contents, None if found is None else found.step)
        if ranks.rank == 0 and isinstance(self._janitor, Uploads):
            self._janitor.begin()
        self._tell(contents, found)
        return found

    def went_on(self, step: int) -> None:
        """Say that the run goes on after `step`, which came from elsewhere, such as memory of its nodes. Collective.

        Newer checkpoints here belong to a history that was given up, as after `resume`.
        """
        self._settle()
        self._signals.install()
        self._check_tiers()
        contents = self._ranks.decide(lambda: self._janitor.ask(self._shelf.contents))
        self._ranks.decide(lambda: self._put_aside(contents, step, elsewhere=True))
        self._history = History.after_other(contents, step)
        if self._ranks.rank == 0 and isinstance(self._janitor, Uploads):
            self._janitor.begin()

    def find(self, step: int | None = None) -> Saved | None:
        """The checkpoint that `resume` tries first, the same on all ranks. Collective."""
        return self._ranks.decide(lambda: next(iter(candidates(self._shelf, self._shelf.contents(), step)), None))

    def step(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """To be called by all ranks after each optimizer step; `step` counts them from the run's first.

        Saves when it is due, and when the job is being ended: then the save is committed when this returns. `metrics`
        are numbers that are the same on all ranks (rank 0's are kept). Returns the save that was begun, if any.
        """
        self._signals.install()
        word = self._heard()
        last = word.preempted and not self.preempted
        if not word.busy and not last:
            self._settle()
        begun = None
        if last:
            begun = self._last_save(step, state, metrics)
        elif self._due(step):
            if word.busy and self.busy == "skip":
                _log.warning("%s: step %d is not saved, the save before still runs", self.url, step)
            else:
                begun = self.save(step, state, metrics=metrics)
        self._say()
        return begun

    def save(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Begin a save of `step`, due or not, after the one before has ended. Collective.

        Returns when `state` may change; ``.result()`` of what it returns waits for the commit.
        """
        numbers = self._numbers(metrics)
        self._signals.install()
        self._settle()
        history = self._known()
        history.check(step, self.url)
        if step in history.in_the_way:
            self._ranks.decide(lambda: self._janitor.ask(lambda: self._shelf.remove(step)))
        if self._ranks.rank == 0:
            self._record(step, numbers)
        handle = async_save(state, self._shelf.where(step), step=step, on_error=self.on_error, **self.options)
        self._flight = _Flight(step, handle, history.newest)
        history.newest, history.ours = step, True
        return handle

    def measured(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Say the metrics of a step whose save has begun already: rank 0's are kept, in place of those given then."""
        numbers = self._numbers(metrics)
        if self._ranks.rank == 0:
            self._record(step, numbers)

    def preempt(self) -> None:
        """Say on this rank what a signal would: the job will be ended soon."""
        self._signals.asked = True

    def close(self) -> None:
        """Wait for the save under way and for deletions, and give signals back. Raises if that save failed."""
        self._signals.restore()
        try:
            self._settle()
        finally:
            self._end_uploads()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._signals.restore()
        self._janitor.dismiss()

    def _check_tiers(self) -> None:
        """Before the first look at two folders: do all ranks see the same? Then what waits is copied."""
        if isinstance(self._shelf, Tiers) and not self._checked:
            self._shelf.check_shared(self._ranks)
            self._checked = True

    def _end_uploads(self) -> None:
        """Wait for deletions and uploads."""
        try:
            self._janitor.close()
        except UcpError as error:
            if self.on_error == "raise":
                raise
            _log.warning("%s", error)

    @property
    def _ranks(self) -> Ranks:
        if self._ranks_made is None:
            self._ranks_made = Ranks()
        return self._ranks_made

    def _word(self) -> Word:
        return Word(self._signals.asked, self._flight is not None and not self._flight.handle.done())

    def _say(self) -> None:
        """Tell the other ranks how things are here; they hear it at the next step, so that nobody waits now."""
        if self._ranks.size > 1:
            self._told = self._flight
            self._ranks.say(self._word())

    def _heard(self) -> Word:
        """How things are on all ranks: the same word on each. A save begun since they told is taken to be running."""
        if self._ranks.size == 1:
            return self._word()
        word = self._ranks.hear()
        return Word(word.preempted, self._flight is not None and (word.busy or self._told is not self._flight))

    def _due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0 and step != self._known().newest

    def _known(self) -> History:
        """What the folder held when the run began, on all ranks; looked at once."""
        if self._history is None:
            self._check_tiers()
            self._history = History.unasked(self._ranks.decide(self._shelf.contents))
        return self._history

    def _last_save(self, step: int, state: Any, metrics: Mapping[str, Any] | None) -> SaveHandle | None:
        """Save in the foreground, as the job is about to end."""
        _log.warning("%s: told to end, saving step %d", self.url, step)
        self.preempted = True
        try:
            self._settle()
        except UcpError as error:
            _log.warning("%s: the save before failed, and this one is tried all the same: %s", self.url, error)
        if step == self._known().newest:
            return None
        handle = self.save(step, state, metrics=metrics)
        self._settle()
        return handle

    def _settle(self) -> None:
        """Wait for the save under way, if any; raise if it failed, or log that under ``on_error="warn"``."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            flight.handle.result()
        except UcpError as error:
            history = self._known()
            history.in_the_way.add(flight.step)
            history.newest = flight.before
            if self.on_error == "raise":
                raise
            _log.warning("%s: goes on without step %d: %s", self.url, flight.step, error)
        else:
            if self._ranks.rank == 0:
                self._janitor.committed(flight.step)

    def _numbers(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if numbers and self.keep.best is not None and self.keep.best.metric not in numbers:
            raise UsageError(
                f"the metrics have no {self.keep.best.metric!r}, which says what is best",
                hint=f"there are: {' '.join(numbers)}",
            )
        return numbers

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Before the save, so that no committed checkpoint lacks its metrics."""
        try:
            self._shelf.record(step, metrics)
        except UcpError as error:
            # The save that follows meets the same trouble, and tells all ranks.
            _log.warning("%s: metrics of step %d are lost: %s", self.url, step, error)

    def _put_aside(self, contents: Contents, step: int | None, *, elsewhere: bool = False) -> None:
        """Newer checkpoints than the one taken, of `step`, which lies here or `elsewhere`, belong to no history now."""
        if step is None:
            return
        for saved in contents.saved:
            aside = saved.step > step or (saved.aside and (elsewhere or saved.step != step))
            if aside != saved.aside:
                self._shelf.mark(saved, aside=aside)

    def _tell(self, contents: Contents, found: Resumed | None) -> None:
        if self._ranks.rank != 0:
            return
        if found is not None:
            _log.info("%s", found)
        elif contents.incomplete:
            urls = ", ".join(map(self._shelf.where, contents.incomplete))
            _log.warning("%s: no complete checkpoint, a new run begins; incomplete: %s", self.url, urls)
