"""The journal: which objects of a conversion are finished, so that a run that was cut short goes on where it stopped.

It lives in the destination under ``.ucp-journal/`` as numbered objects of JSON lines, since stores cannot append. An
object is listed only after it is durable. The journal goes when the checkpoint is complete.
"""

from __future__ import annotations

import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass

from ucp.errors import NotFoundError, StorageError
from ucp.plan import Digests
from ucp.run.claim import FOLDER, Claim
from ucp.run.crc import crc
from ucp.run.integrity import Piece
from ucp.store import Store


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
        try:
            name, *sums, pieces = json.loads(text)
            crc32c, crc32 = (tuple(map(_natural, values)) for values in sums)
            noted = tuple(Piece(*map(_natural, piece)) for piece in pieces)
        except (ValueError, TypeError, RecursionError):
            return None
        return cls(name, Digests(crc32c, crc32), noted) if isinstance(name, str) else None


class Journal:
    """The notes of one `claim` on `store`. Notes of another generation are not looked at."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self.store = store
        self._prefix = FOLDER + (f"{claim.generation}-" if claim.generation else "")
        self._pending: list[Done] = []
        self._lock = threading.Lock()
        self._part = 0

    def open(self) -> dict[str, Done]:
        """What an earlier run of the same plan finished, by object.

        Damaged lines are passed over: what they listed is done again.
        """
        done: dict[str, Done] = {}
        part = re.compile(re.escape(self._prefix) + r"(\d{6,})\.jsonl")
        for entry in list(self.store.entries(self._prefix)):
            number = part.fullmatch(entry.path)
            if number is None:
                continue
            self._part = max(self._part, int(number[1]) + 1)
            with suppress(NotFoundError):  # another run of this plan has just ended
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
            self._flush([done.object for done in pending])
            lines = [done.line() for done in pending]
            self.store.put(f"{self._prefix}{self._part:06d}.jsonl", "\n".join(lines).encode())
            self._part += 1

    def _flush(self, paths: list[str]) -> None:
        try:
            self.store.flush(paths)
        except NotFoundError as error:
            raise StorageError(
                f"{self.store.url}: what was written here is gone: {error.message}",
                hint="somebody else changes the destination; run the same command again: it resumes",
            ) from error


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value
