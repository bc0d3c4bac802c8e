"""The journal: which objects of a conversion are finished, so that a run that was cut short goes on where it stopped.

It lives in the destination under ``.ucp-journal/`` as numbered objects of JSON lines, since stores cannot append. An
object is listed only after it is durable. The journal goes when the checkpoint is complete.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ucp.plan import Digests
from ucp.run.crc import crc
from ucp.run.integrity import Piece
from ucp.store import Store

FOLDER = ".ucp-journal/"
VERSION = 1
"""Of the journal's own form; a journal of another version is not resumed."""

_HEAD = FOLDER + "plan.json"
_PART = re.compile(re.escape(FOLDER) + r"(\d{6,})\.jsonl")


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that one run really moved: tensor data read, bytes read only to compare, and bytes written."""

    read: int = 0
    checked: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """A finished object: its digests, and the pieces of source digests noted while it was written.

    `moved` is of the run that wrote it and is not journalled.
    """

    object: str
    digests: Digests
    pieces: tuple[Piece, ...]
    moved: Moved = Moved()

    def line(self) -> str:
        """One line: its crc32c, and JSON."""
        pieces = [[p.span, p.offset, p.length, p.value] for p in self.pieces]
        text = json.dumps([self.object, self.digests.crc32c, self.digests.crc32, pieces])
        return f"{crc('crc32c', text.encode()):08x} {text}"

    @classmethod
    def parse(cls, line: str) -> Done | None:
        """The inverse of `line`; None for one that is damaged."""
        digest, _, text = line.partition(" ")
        if digest != f"{crc('crc32c', text.encode()):08x}":
            return None
        name, crc32c, crc32, pieces = json.loads(text)
        return cls(name, Digests(tuple(crc32c), tuple(crc32)), tuple(Piece(*p) for p in pieces))


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
        """Fingerprint of the plan whose journal lies in `store`, or None if there is no journal.

        Empty for a journal that is damaged or of another version.
        """
        if not store.exists(_HEAD):
            return None
        try:
            head = json.loads(store.read(_HEAD))
        except (ValueError, RecursionError):
            return ""
        known = isinstance(head, dict) and head.get("version") == VERSION
        return str(head.get("fingerprint", "")) if known else ""

    def open(self) -> dict[str, Done]:
        """Start the journal, or read what an earlier run of the same plan finished, by object.

        Damaged lines are passed over: what they listed is done again.
        """
        if self.plan_of(self.store) != self.fingerprint:
            self.store.put(_HEAD, json.dumps({"version": VERSION, "fingerprint": self.fingerprint}).encode())
            return {}
        done: dict[str, Done] = {}
        for entry in self.store.entries(FOLDER):
            number = _PART.fullmatch(entry.path)
            if number is None:
                continue
            self._part = max(self._part, int(number[1]) + 1)
            lines = self.store.read(entry.path).decode(errors="replace").splitlines()
            done |= {found.object: found for found in map(Done.parse, lines) if found is not None}
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
