"""How long things took, counted as they end: saves, loads and conversions. Always on, and cheap: few end per minute."""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

NAMES: Mapping[str, str] = {
    "save_stall": "time that training stood still in a call of save or async_save",
    "save_staged": "time from the call of a save until the state might change again",
    "save_committed": "time from the call of a save until its checkpoint was complete",
    "load": "duration of loads",
    "convert": "duration of conversions",
}
"""What is timed, and what it says."""

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Upper bounds, in seconds, of the classes that durations are counted in; there is one above them all."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How often something ended, the `seconds` that took together, and how many were in each class of `BUCKETS`."""

    count: int
    seconds: float
    buckets: tuple[int, ...]


class Timings:
    """Durations of one process; any thread may tell some."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()
        self._listeners: list[Callable[[str, float], None]] = []

    def add(self, name: str, seconds: float) -> None:
        """Count one duration of a thing of `NAMES`."""
        assert name in NAMES, name
        with self._lock:
            buckets, total = self._rows.setdefault(name, ([0] * (len(BUCKETS) + 1), [0.0]))
            buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
            total[0] += seconds
        for listener in self._listeners:
            listener(name, seconds)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Count how long it takes to leave, with or without an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def snapshot(self) -> dict[str, Timing]:
        """What was counted so far, by name."""
        with self._lock:
            return {
                name: Timing(sum(buckets), total[0], tuple(buckets)) for name, (buckets, total) in self._rows.items()
            }

    def listen(self, listener: Callable[[str, float], None]) -> None:
        """Have each later duration told to `listener`."""
        self._listeners.append(listener)

    def _forked(self) -> None:
        self._lock, self._rows, self._listeners = threading.Lock(), {}, []


TIMINGS = Timings()
"""The durations of this process."""

os.register_at_fork(after_in_child=TIMINGS._forked)
