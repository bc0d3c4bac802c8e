"""What goes over the seam to storage, counted: requests, bytes, failures, retries and the seconds waited for them.

Always on, since it costs a fraction of a microsecond per request; `ucp.metrics` hands it on to monitoring systems.
A scheme is that of the URL (``file`` for local paths); an operation is a word of `OPERATIONS`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

OPERATIONS = ("get", "put", "part", "head", "list", "delete", "copy", "flush")
"""Reading bytes, writing an object, writing a part of one, asking for its size, listing, deleting, copying inside the
store, making durable. A store may count further ones."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of one kind: how many were answered, how many `failed` for good, bytes `read` and `written`."""

    count: int = 0
    failed: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Retries:
    """Retries for one reason: how many, and the seconds `waited` before them."""

    count: int = 0
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts at one time: `requests` by (scheme, operation), `retries` by (scheme, reason)."""

    requests: Mapping[tuple[str, str], Requests] = field(default_factory=dict)
    retries: Mapping[tuple[str, str], Retries] = field(default_factory=dict)

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(row.read for row in self.requests.values())

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(row.written for row in self.requests.values())

    def since(self, earlier: Traffic) -> Traffic:
        """What came after `earlier`, a snapshot of the same counters."""
        none, never = Requests(), Retries()
        requests, retries = {}, {}
        for key, now in self.requests.items():
            then = earlier.requests.get(key, none)
            if now != then:
                requests[key] = Requests(
                    now.count - then.count, now.failed - then.failed, now.read - then.read, now.written - then.written
                )
        for key, again in self.retries.items():
            before = earlier.retries.get(key, never)
            if again != before:
                retries[key] = Retries(again.count - before.count, again.waited - before.waited)
        return Traffic(requests, retries)


class Counters:
    """Counters of a process; any thread may count. A forked child begins at zero."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str], list[int]] = {}
        self._retries: dict[tuple[str, str], list[float]] = {}
        self._lock = threading.Lock()

    def request(self, scheme: str, op: str, read: int = 0, written: int = 0) -> None:
        """Count a request that was answered, with the bytes of objects that it moved."""
        with self._lock:
            row = self._requests.get((scheme, op))
            if row is None:
                row = self._requests[scheme, op] = [0, 0, 0, 0]
            row[0] += 1
            row[2] += read
            row[3] += written

    def moved(self, scheme: str, op: str, *, read: int = 0, written: int = 0) -> None:
        """Count bytes of a request that was counted before they were known."""
        self.add(Traffic({(scheme, op): Requests(0, 0, read, written)}))

    def failed(self, scheme: str, op: str) -> None:
        """Count a request that failed for good; that there is no such object is an answer."""
        with self._lock:
            self._requests.setdefault((scheme, op), [0, 0, 0, 0])[1] += 1

    def retried(self, scheme: str, reason: str, waited: float = 0.0) -> None:
        """Count a retry for `reason`, such as ``throttled``, ``reset`` or ``timeout``, `waited` seconds before it."""
        with self._lock:
            row = self._retries.setdefault((scheme, reason), [0, 0.0])
            row[0] += 1
            row[1] += waited

    def snapshot(self) -> Traffic:
        """The counts so far; can be pickled."""
        with self._lock:
            return self._traffic()

    def drain(self) -> Traffic:
        """The counts since the last `drain`: what a worker process hands to the one that it works for."""
        with self._lock:
            taken = self._traffic()
            self._requests, self._retries = {}, {}
            return taken

    def add(self, traffic: Traffic) -> None:
        """Count what another process did."""
        with self._lock:
            for key, more in traffic.requests.items():
                row = self._requests.setdefault(key, [0, 0, 0, 0])
                for place, number in enumerate((more.count, more.failed, more.read, more.written)):
                    row[place] += number
            for key, again in traffic.retries.items():
                other = self._retries.setdefault(key, [0, 0.0])
                other[0] += again.count
                other[1] += again.waited

    def _traffic(self) -> Traffic:
        requests = {key: Requests(*row) for key, row in self._requests.items()}
        return Traffic(requests, {key: Retries(int(row[0]), row[1]) for key, row in self._retries.items()})

    def _forked(self) -> None:
        """Another thread of the parent may have held the lock, and what it counted is the parent's to tell."""
        self._lock = threading.Lock()
        self._requests, self._retries = {}, {}


TRAFFIC = Counters()
"""The counters of this process."""

os.register_at_fork(after_in_child=TRAFFIC._forked)
