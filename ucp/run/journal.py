"""The journal: which objects of a conversion are finished, so that a run that was cut short goes on where it stopped.

It lives in the destination under ``.ucp-journal/`` as numbered objects of JSON lines, since stores cannot append. An
object is listed only after it is durable. The journal goes when the checkpoint is complete.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ucp.plan import Digests
from ucp.run.integrity import Piece
from ucp.store import Store

FOLDER = ".ucp-journal/"
_HEAD = FOLDER + "plan.json"


@dataclass(frozen=True, slots=True)
class Done:
    """A finished object: its digests, and the pieces of source digests noted while it was written."""

    object: str
    digests: Digests
    pieces: tuple[Piece, ...]

    def line(self) -> str:
        """One JSON line."""
        pieces = [[p.span, p.offset, p.length, p.value] for p in self.pieces]
        return json.dumps([self.object, self.digests.crc32c, self.digests.crc32, pieces])

    @classmethod
    def parse(cls, line: str) -> Done:
        """The inverse of `line`; ValueError if it is not one."""
        name, crc32c, crc32, pieces = json.loads(line)
        return cls(str(name), Digests(tuple(crc32c), tuple(crc32)), tuple(Piece(*p) for p in pieces))


class Journal:
    """The journal of one destination for the plan with the given `fingerprint`."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.store = store
        self.fingerprint = fingerprint
        self._pending: list[Done] = []
        self._lock = threading.Lock()
        self._part = 0

    @staticmethod
    def plan_of(store: Store) -> str | None:
        """Fingerprint of the plan whose journal lies in `store`, or None if there is no journal."""
        if not store.exists(_HEAD):
            return None
        head = json.loads(store.read(_HEAD))
        return str(head["fingerprint"])

    def open(self) -> dict[str, Done]:
        """Start the journal, or read what an earlier run of the same plan finished, by object."""
        if self.plan_of(self.store) != self.fingerprint:
            self.store.put(_HEAD, json.dumps({"fingerprint": self.fingerprint}).encode())
            return {}
        done: dict[str, Done] = {}
        for entry in self.store.entries(FOLDER):
            if not entry.path.endswith(".jsonl"):
                continue
            self._part = max(self._part, int(entry.path[len(FOLDER) :].split(".")[0]) + 1)
            for line in self.store.read(entry.path).decode().splitlines():
                found = Done.parse(line)
                done[found.object] = found
        return done

    def add(self, done: Done) -> None:
        """Note a finished object; `flush` makes it and the note durable."""
        with self._lock:
            self._pending.append(done)

    def flush(self) -> None:
        """Make the objects noted since the last flush durable, then their notes."""
        with self._lock:
            pending, self._pending = self._pending, []
        if pending:
            self.store.flush([done.object for done in pending])
            lines = [done.line() for done in pending]
            self.store.put(f"{FOLDER}{self._part:06d}.jsonl", "\n".join(lines).encode())
            self._part += 1

    def remove(self) -> None:
        """Delete the journal, its head last."""
        remove(self.store)


def remove(store: Store) -> None:
    """Delete the journal of `store`, its head last, so that what is left of it is never taken for another's."""
    parts: Iterable[str] = [entry.path for entry in store.entries(FOLDER)]
    for path in sorted(parts, key=lambda path: path == _HEAD):
        store.delete(path)
