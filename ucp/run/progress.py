"""Progress of a run, as values that anything may show."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from ucp.errors import InterruptedRunError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Bytes are of tensor data; `resumed_bytes` of them were finished by an earlier run."""

    bytes_done: int
    bytes_total: int
    objects_done: int
    objects_total: int
    seconds: float
    resumed_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did. `bytes_checked` are low-precision copies and padding read only to check."""

    bytes_read: int
    bytes_checked: int
    bytes_written: int
    objects: int
    seconds: float
    resumed_objects: int
    already_done: bool


class Counter:
    """Bytes and objects done, counted from several threads."""

    def __init__(self, bytes_total: int, objects_total: int) -> None:
        self.bytes_total = bytes_total
        self.objects_total = objects_total
        self.bytes_done = self.objects_done = self.resumed_bytes = 0
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Make every later `advance` raise, so that workers end at their next block."""
        self._stopped = True

    def advance(self, count: int) -> None:
        """Add `count` bytes; InterruptedRunError once stopped."""
        if self._stopped:
            raise InterruptedRunError("stopped", hint="run the same command again: it resumes")
        with self._lock:
            self.bytes_done += count

    def finish_object(self) -> None:
        """Add one object."""
        with self._lock:
            self.objects_done += 1

    def skip(self, nbytes: int) -> None:
        """Count an object of `nbytes` that an earlier run finished."""
        with self._lock:
            self.bytes_done += nbytes
            self.resumed_bytes += nbytes
            self.objects_done += 1

    @property
    def seconds(self) -> float:
        """Seconds since the counter was made."""
        return time.perf_counter() - self._start

    def progress(self) -> Progress:
        """A snapshot."""
        with self._lock:
            return Progress(
                self.bytes_done,
                self.bytes_total,
                self.objects_done,
                self.objects_total,
                self.seconds,
                self.resumed_bytes,
            )
