"""A job started once more on other nodes, at the same URL: the later start goes on, and the earlier one ends.

Nodes know of a second start by a lock of theirs (`ucp.elastic.sole`); nodes of another start do not hear of these.
What both know is storage, where each start has a number that no other one has (`ucp.elastic.records`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ucp.elastic.records import Past, Records, Start
from ucp.elastic.timeline import Beat
from ucp.errors import ConflictError, UcpError

_PERIOD = 20.0
"""Seconds between two looks at storage: in between, two starts may both be at work."""

_MOMENT = 2.0
_SILENCE = 6 * _PERIOD
"""Seconds after which a start that says nothing is gone."""


class Fence:
    """Says for rank 0, in a thread of its own, that this `start` is at work, and looks for a `later` one."""

    def __init__(self, url: str, records: Records, start: Start) -> None:
        self.later: Start | None = None
        self._url, self._records, self._start = url, records, start
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._look_again, name="ucp-fence", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Look now: something is being put into storage."""
        self._wake.set()

    def check(self) -> None:
        """ConflictError if a later start was seen."""
        if self.later is not None:
            raise ConflictError(
                f"{self._url}: the job was started again, on {_named(self.later)} (epoch {self.later.epoch}): this "
                f"start (epoch {self._start.epoch}) ends",
                hint="a job is started once: end one of the two, or give one another url (and job=, if it has one)",
            )

    def end(self, *, wait: bool) -> None:
        """Say no more, and look no more: this start ends. If to `wait`, a look that is under way has a moment."""
        self._over = True
        self._wake.set()
        if wait:
            self._thread.join(_MOMENT)

    def look(self) -> None:
        """Ask storage for a later start. Raises what the store raises."""
        newest = self._records.newest()
        if newest.epoch > self._start.epoch:
            self.later = newest

    def _look_again(self) -> None:
        while self.later is None and not self._over:
            self._wake.wait(_PERIOD)
            self._wake.clear()
            if not self._over:
                with suppress(UcpError):  # training does not depend on it: the next look may be answered
                    self.look()
                    if self.later is None:
                        self._records.alive(self._start)


def check_not_given_up(url: str, beats: Iterable[Beat], newest: Start, past: Past, here: Sequence[str]) -> None:
    """ConflictError if the nodes `here` had to leave the job to the start `newest`, and that is still at work.

    Otherwise a launcher that starts anew what has ended would have the two starts end each other again and again.
    `beats` tell what the nodes had to do, `past` whether the other start came to its end.
    """
    if not any(beat.lost_to for beat in beats) or set(newest.nodes) & set(here):
        return
    ended = past.ended is not None and past.epoch >= newest.epoch
    silent = time.time() - newest.alive
    if not ended and silent < _SILENCE:
        where = f"{_named(newest)} (epoch {newest.epoch}, heard of {silent:.0f} s ago)"
        raise ConflictError(
            f"{url}: the job goes on elsewhere, on {where}",
            hint=f"end one of the two; this one may go on when the other was silent for {_SILENCE:.0f} s",
        )


def _named(start: Start) -> str:
    return ("nodes " if len(start.nodes) > 1 else "node ") + ", ".join(start.nodes)
