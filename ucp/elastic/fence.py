"""A job started once more on other nodes, at the same URL: the later start goes on, and the earlier one ends.

Nodes know of a second start by a lock of theirs (`ucp.elastic.sole`); nodes of another start do not hear of these.
What both know is storage, where each start has a number that no other one has (`ucp.elastic.records`). A start counts
when it trains: one that comes to nothing ends nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import replace

from ucp.elastic.records import Records, Start
from ucp.elastic.timeline import Beat, last_start
from ucp.errors import ConflictError

_log = logging.getLogger("ucp")

_PERIOD = 20.0
"""Seconds between two looks at storage: in between, two starts may both be at work."""

_SILENCE = 300.0
"""Seconds after which a start of which nothing is heard is gone: longer than a store may take for an answer."""

_GLANCE = 2.0
_MOMENT = 2.0
_HINT = "a job is started once: end one of the two, or give one another url (and job=, if it has one)"


class Fence:
    """Says for rank 0, in a thread of its own, that this `start` trains, and looks for a `later` one that does."""

    def __init__(self, url: str, records: Records, start: Start) -> None:
        self.later: Start | None = None
        self._url, self._records, self._start = url, records, replace(start, trains=True)
        self._wake, self._over, self._failed = threading.Event(), threading.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The first step is done: from now on this start counts."""
        self._thread = threading.Thread(target=self._stand, name="ucp-fence", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Look now: something is being put into storage."""
        self._wake.set()

    def check(self) -> None:
        """ConflictError if a later start was seen."""
        later, mine = self.later, self._start
        if later is None:
            return
        what = "the job was started again" if later.run == mine.run else "the run was deleted and begun anew"
        raise ConflictError(
            f"{self._url}: {what}, {_where(later)}: this start (epoch {mine.epoch}) ends",
            hint=_HINT,
        )

    def look(self) -> None:
        """Ask storage for a later start. What does not answer is no failure: training does not depend on it."""
        try:
            self.later = self._records.later(self._start)
            self._failed = False
        except Exception as error:  # noqa: BLE001  clients of stores raise what they like
            if not self._failed:
                _log.warning("%s: whether the job was started again is not known: %s", self._url, error)
            self._failed = True

    def end(self, *, wait: bool) -> None:
        """Say no more, and look no more: this start ends. If to `wait`, a look that is under way has a moment."""
        self._over.set()
        self._wake.set()
        if wait and self._thread is not None:
            self._thread.join(_MOMENT)

    def _stand(self) -> None:
        said = float("-inf")
        while not self._over.is_set():
            self.look()
            if self.later is not None:
                return
            if not self._over.is_set() and not self._failed and time.monotonic() - said >= _PERIOD:
                said = time.monotonic()
                self._say()
            self._wake.wait(_PERIOD)
            self._wake.clear()

    def _say(self) -> None:
        try:
            self._records.alive(self._start)
        except Exception as error:  # noqa: BLE001
            _log.debug("%s: epoch %d is not told to be alive: %s", self._url, self._start.epoch, error)


def check_not_given_up(url: str, records: Records, beats: Iterable[Beat]) -> None:
    """ConflictError if this node had to leave the job to a start that is still at work, as `beats` tell.

    Otherwise a launcher that starts anew what has ended would have the two starts end each other again and again. That
    start is watched until it is heard of once more, has come to its end, or was silent for long.
    """
    if not any(beat.lost_to for beat in last_start(beats)):
        return
    other, deadline = records.newest(), time.monotonic() + _SILENCE
    _log.info("%s: the job was left to another start, %s: is that still at work?", url, _where(other))
    while time.monotonic() < deadline and not records.past().ended_with(other.epoch):
        time.sleep(_GLANCE)
        newest = records.newest()
        if (newest.epoch, newest.alive) != (other.epoch, other.alive):
            raise ConflictError(
                f"{url}: the job goes on elsewhere, {_where(newest)}",
                hint=f"{_HINT}; this one may go on when the other one was silent for {_SILENCE:.0f} s",
            )


def _where(start: Start) -> str:
    nodes = ("nodes " if len(start.nodes) > 1 else "node ") + ", ".join(start.nodes)
    return f"on {nodes} (epoch {start.epoch})"
