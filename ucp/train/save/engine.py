"""The saves of a group of ranks, one after the other: what they share, and the thread in which they are written."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import Any

from torch import distributed

from ucp.errors import UcpError
from ucp.metrics import TIMINGS
from ucp.train.declared import DeclaredLayout
from ucp.train.save.channel import Channel
from ucp.train.save.form import Form
from ucp.train.save.handle import SaveHandle, SaveReport
from ucp.train.save.job import Cached, Job
from ucp.train.save.lead import Lead
from ucp.train.save.staging import Buffers
from ucp.train.team import attempt

_LOG = logging.getLogger("ucp")
_UNSEEN = UcpError("this rank has not looked at its state")


class Engine:
    """Saves of one group of ranks. Making one is collective."""

    def __init__(self, group: Any) -> None:
        self.channel, self.buffers, self.lead = Channel(group), Buffers(), Lead()
        self._cached: Cached | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._pending: list[SaveHandle] = []
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @TIMINGS.measured("save_stall")
    def save(
        self,
        state: Any,
        url: str,
        *,
        step: int | None,
        form: Form,
        overwrite: bool,
        layout: DeclaredLayout | None = None,
    ) -> SaveReport:
        """Save `state` from where it lies, in this thread; raises on all ranks if it fails on any."""
        self.drain()
        job = Job(form, SaveHandle(url, step), _UNSEEN, overwrite)
        job.look(state, self._cached, stages=False, declared=layout)
        with self._uninterrupted():
            self._agree(job)
            return job.write(self.channel)

    @TIMINGS.measured("save_stall")
    def start(
        self,
        state: Any,
        url: str,
        *,
        step: int | None,
        form: Form,
        wait: bool,
        strict: bool,
        overwrite: bool,
        layout: DeclaredLayout | None = None,
    ) -> SaveHandle:
        """Begin to save `state`; returns when it is staged, or at once if not to `wait`.

        What is wrong here and now is raised if `strict`, as is an earlier failure that nobody has heard of.
        """
        job = Job(form, SaveHandle(url, step), (strict and self._unheard()) or _UNSEEN, overwrite)
        cached = self._cached
        if job.mine is _UNSEEN:
            job.look(state, cached, stages=True, declared=layout)
        if cached is None:
            # No layout is known to all: this once they agree before they stage.
            self.drain()
            with self._uninterrupted():
                self._agree_now(job)
        if isinstance(job.mine, Exception):
            job.handle.staged.set_result(None)
        elif wait:
            job.stage(self.buffers)
        elif job.on_device:
            # Queued here, so that it comes after what this thread has queued on its streams.
            job.begin_staging(self.buffers)
            threading.Thread(target=job.end_staging, name="ucp-stage").start()
        else:
            # Taken here, so that saves get their memory in the order in which they are written.
            job.buffer = self.buffers.take()
            threading.Thread(target=job.stage, args=(self.buffers,), name="ucp-stage").start()
        failed = job.mine if wait and strict and isinstance(job.mine, Exception) else None
        job.handle.committed.heard = failed is not None
        self._submit(job)
        if failed is not None:
            raise failed
        return job.handle

    def drain(self) -> None:
        """Wait until no save is under way, whatever becomes of them."""
        wait_for([handle.committed for handle in self._pending])

    def finish(self) -> None:
        """Wait for what is under way, before the interpreter ends."""
        if os.getpid() == self._process:
            waiting = [handle.url for handle in self._pending if not handle.done()]
            if waiting:
                _LOG.info("waiting until %s is written", " ".join(waiting))
            self.drain()
            if self._thread is not None:
                # A thread that the interpreter ends while it lets go of tensors takes the whole process down with it.
                self._jobs.put(None)
                self._thread.join()
                self._thread = None

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            # The others wait for an answer that will not come any more.
            self.channel.close()
            raise

    def _agree(self, job: Job) -> None:
        try:
            self._cached = job.agree(self.channel, self.lead)
        except Exception:
            # Whatever it was, the next save starts anew, and waits for the others once.
            self._cached = None
            raise

    def _agree_now(self, job: Job) -> None:
        found = attempt(lambda: self._agree(job))
        if isinstance(found, Exception):
            job.mine, job.refused = found, True

    def _unheard(self) -> Exception | None:
        failed = [handle.committed for handle in self._pending if handle.committed.unheard]
        for outcome in failed:
            outcome.heard = True
        return next((error for outcome in failed if isinstance(error := outcome.exception(), Exception)), None)

    def _submit(self, job: Job) -> None:
        self._pending = [one for one in self._pending if not one.done() or one.committed.unheard]
        self._pending.append(job.handle)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ucp-save", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)
            del job  # with all that it holds of the training, which would wait for the next one

    def _run(self, job: Job) -> None:
        job.handle.staged.result()
        found = attempt(lambda: self._finished(job))
        attempt(job.close)
        if not isinstance(found, Exception):
            job.handle.committed.set_result(found)
            return
        if self.channel.rank == 0 or isinstance(job.mine, Exception):
            _LOG.error("%s: not saved: %s", job.handle.url, found)
        job.handle.committed.set_exception(found)

    def _finished(self, job: Job) -> SaveReport:
        if job.refused and isinstance(job.mine, Exception):
            raise job.mine
        if job.order is None:
            self._agree(job)
        return job.write(self.channel)


_ENGINES: list[tuple[Any, str, Engine]] = []
"""By process group, compared by identity (None where there is none), and lane."""


def engine_of(group: Any, lane: str = "") -> Engine:
    """The engine of the ranks of `group`, or of all ranks; made, collectively, for their first save.

    Saves of one lane are written one after the other; another lane, with host memory and a thread of its own, waits
    for none of them: what goes to memory does not queue behind what goes to slow storage.
    """
    key = group
    if group is None and distributed.is_available() and distributed.is_initialized():
        key = distributed.group.WORLD
    for known, name, engine in _ENGINES:
        if known is key and name == lane:
            return engine
    _ENGINES.append((key, lane, Engine(group)))
    return _ENGINES[-1][2]


def abandon_saves() -> None:
    """Give up the saves under way, of all lanes, since ranks that they need are gone: nobody waits for them any more.

    They are no checkpoints, unless they were complete already. For a process that is about to end.
    """
    while _ENGINES:
        _ENGINES.pop()[2].channel.close()


def _finish() -> None:
    for _, _, engine in _ENGINES:
        engine.finish()


# Functions of `atexit` come too late: pools of threads take no work by then, nor can threads be started.
threading._register_atexit(_finish)  # type: ignore[attr-defined]
