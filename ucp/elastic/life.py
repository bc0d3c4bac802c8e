"""What one start of a job says of itself while it lives, and hears of others: its ranks, and other starts."""

from __future__ import annotations

import logging
from typing import Any

from ucp.elastic.fence import Fence
from ucp.elastic.holdings import Holdings
from ucp.elastic.timeline import Pulse, forget
from ucp.elastic.watch import Watch
from ucp.elastic.world import World

_log = logging.getLogger("ucp")


class Life:
    """From when the ranks have met: `line` is a store of theirs that another thread may use."""

    def __init__(self, world: World, line: Any, timeout: float) -> None:
        self._world, self._folder = world, ""
        self._pulse: Pulse | None = None
        self._fence: Fence | None = None
        self._watch = Watch(world, line, timeout, glance=self._glance)
        self._watch.begin()

    def numbered(self, url: str, held: Holdings, folder: str) -> None:
        """The start has a number, and is told from others by it. In `folder` this node keeps signs of life."""
        world, self._folder = self._world, folder
        place = {"epoch": held.epoch, "rank": world.rank, "size": world.size}
        self._pulse = Pulse(folder, **place, before=held.reached, run=held.run)
        if world.rank == 0:
            self._fence = Fence(url, held.records, held.start)
        if world.local_rank == 0:
            forget(folder, before=held.epoch)  # not earlier: what is lost now is known by nobody else

    def done(self, step: int, *, first: bool) -> None:
        """The optimizer step is done; if it is the `first` of this start, that counts from now on."""
        if self._pulse is not None:
            self._pulse.done(step)
        if first and self._fence is not None:
            self._fence.begin()

    def saves(self) -> None:
        """Something is being put into storage, where another start may do so, too."""
        if self._fence is not None:
            self._fence.hurry()

    def check(self, *, last: bool = False) -> None:
        """On rank 0: ConflictError if the job was started again elsewhere; look first, if for the `last` time."""
        if self._fence is None:
            return
        if last:
            self._fence.look()
        if self._fence.later is not None and self._pulse is not None:
            self._pulse.lost_to(self._fence.later.epoch)
        self._fence.check()

    def end(self) -> None:
        """All is done: hear of nobody any more. Removing much may take longer than the others are there."""
        if self._fence is not None:
            self._fence.end(wait=True)
        self._watch.end()

    def forget(self) -> None:
        """Leave nothing behind."""
        if self._pulse is not None:
            self._pulse.close(remove=True)

    def leave(self, reason: str) -> None:
        """Tell the others that this rank leaves and why, and hear if that comes of another one."""
        if (first := self._watch.tell(reason)) is not None:
            _log.error("rank %d on %s: before that, %s", self._world.rank, self._world.node, first)

    def break_off(self) -> None:
        """End without waiting for others. What tells of this start stays."""
        self._watch.end(wait=False)
        if self._fence is not None:
            self._fence.end(wait=self._world.alone)
        if self._pulse is not None:
            self._pulse.close(remove=False)

    def _glance(self) -> None:
        """About five times a second, in a thread of its own."""
        if self._pulse is not None:
            self._pulse.alive(self._watch.heard)
