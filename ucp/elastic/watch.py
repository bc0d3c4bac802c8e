"""Each rank watches another one, so that nobody waits for ranks that are gone, whatever it waits in."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ucp.elastic.ending import leave
from ucp.elastic.world import World

_log = logging.getLogger("ucp")

_LEFT = "left"
_GLANCE = 0.2
_GRACE = 1.0
"""Seconds that a rank which left has for its traceback: the first process to end has torchrun end the others."""

_LEAST_PAUSE, _BEATS_PER_SECOND = 0.5, 500
"""A rank beats every half a second, or less often where the store would have more beats than this to take.

Four times in the `timeout` it does in any case.
"""


class Watch:
    """Beats in the store of the rendezvous and listens to the rank after this one; between them they hear all.

    This process is ended (by `end`, with a reason) when that rank was not heard of for `timeout` seconds, when any rank
    said that it leaves, when the store is gone, or cannot be reached for as long, and when the agent that started it is
    gone. This is what bounds every wait of an elastic job: for collectives, for saves and uploads, for spares. `glance`
    is called about five times a second. It needs the interpreter: what holds its lock for `timeout` seconds looks dead.
    """

    def __init__(
        self,
        world: World,
        store: Any,
        timeout: float,
        *,
        glance: Callable[[], object] = lambda: None,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self.world, self.timeout = world, timeout
        self.heard = time.time()
        """When the rank after this one last beat, in seconds since 1970."""
        self._store, self._glance, self._end = store, glance, end or self._leave
        self._stop = threading.Event()
        self._pause = min(max(_LEAST_PAUSE, world.size / _BEATS_PER_SECOND), timeout / 4)
        self._reached = self._alive = time.monotonic()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Start to beat and to watch, in threads that end with the process."""
        work = [self._guard] if self.world.size == 1 else [self._guard, self._beat]
        self._threads = [threading.Thread(target=one, name=f"ucp{one.__name__}", daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def end(self, *, wait: bool = True) -> None:
        """Watch no longer. A thread that waits for the store is left to itself, after a moment if to `wait`."""
        self._stop.set()
        for thread in self._threads if wait else ():
            thread.join(2 * _LEAST_PAUSE)

    def tell(self, reason: str) -> str | None:
        """Say to the others, for a moment at most, that this rank leaves, so that nobody waits for it.

        The likely cause, where it is not this rank: what the one said that left first, or which was not heard of.
        """
        cause: list[str] = []
        teller = threading.Thread(target=self._tell, args=(reason, cause), name="ucp-leave", daemon=True)
        teller.start()
        teller.join(2 * _LEAST_PAUSE)
        if cause or (self.world.agent is None and self.world.rank == 0):
            # The launcher takes who ends first for the cause; and where the store goes with this process, others are
            # to hear of it.
            time.sleep(_GRACE)
        return next(iter(cause), None)

    def _tell(self, reason: str, cause: list[str]) -> None:
        with suppress(Exception):  # who cannot be told will notice
            silent = self._silent()
            told = f"rank {self.world.rank} on {self.world.node} left: {reason}"
            told += f" ({silent})" if silent is not None else ""
            first = self._store.compare_set(_LEFT, "", told).decode()
            cause += [first] if first != told else [silent] if silent is not None else []

    def _silent(self) -> str | None:
        """A rank that has not beaten for half the `timeout`, as far as clocks of nodes agree.

        Who waits for it in a collective does so for that long. Not all are asked where they are very many.
        """
        rank, size = self.world.rank, self.world.size
        now, over = time.time(), time.monotonic() + _LEAST_PAUSE / 2
        for other in ((rank + one) % size for one in range(1, size)):
            if time.monotonic() > over:
                return None
            if self._store.check([f"beat/{other}"]):
                at, node = self._store.get(f"beat/{other}").decode().split(" ", 1)
                if now - float(at) > self.timeout / 2:
                    return f"rank {other} on {node} was not heard of for {now - float(at):.0f} s"
        return None

    def _beat(self) -> None:
        rank, size = self.world.rank, self.world.size
        other, last = f"beat/{(rank + 1) % size}", b""
        while not self._stop.is_set():
            try:
                self._store.set(f"beat/{rank}", f"{time.time():.3f} {self.world.node}")
                now = self._store.get(other) if self._store.check([other]) else b""
                left = self._store.get(_LEFT).decode() if self._store.check([_LEFT]) else None
            except Exception as error:  # noqa: BLE001  whatever it is, nobody can be heard any more
                if not self._stop.is_set():
                    self._end(f"the store of the rendezvous is gone ({str(error).splitlines()[0]})")
                return
            if left is not None:
                if not self._stop.wait(_GRACE):
                    self._end(left)
                return
            self._reached = time.monotonic()
            if now != last:
                last, self._alive, self.heard = now, self._reached, time.time()
            self._stop.wait(self._pause)

    def _guard(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(_GLANCE):
            now = time.monotonic()
            if now - before > self.timeout / 2:  # this process itself was held up, and could hear nobody
                self._reached = self._alive = now
            before = now
            if (reason := self._reason(now)) is not None:
                self._end(reason)
                return
            self._glance()

    def _reason(self, now: float) -> str | None:
        """Why this process has to end, if it has to."""
        world = self.world
        if world.agent is not None and os.getppid() != world.agent:
            return "the torchrun that started it is gone"
        if world.size == 1:
            return None
        if now - self._reached > self.timeout:
            return f"the store of the rendezvous was out of reach for {self.timeout:g} s"
        if now - self._alive > self.timeout:
            return f"rank {(world.rank + 1) % world.size} was not heard of for {self.timeout:g} s"
        return None

    def _leave(self, reason: str) -> None:
        def last() -> None:
            _log.critical("rank %d on %s ends: %s", self.world.rank, self.world.node, reason)
            self.tell(reason)

        leave(1, last)
