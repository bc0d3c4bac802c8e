"""What a run puts beside its checkpoints, in their folder ``elastic``: an account of each start, and what nodes hold.

``run.json`` tells this run from others that had the same URL, or job, before: who deletes the folder of a run begins
another one. ``start-00007.json`` says that epoch 7 is that of one start alone, on which nodes it is, and when it was
last alive. ``timeline-00007.json`` is the account of epoch 7. ``epoch-00007.json`` is there while nodes hold versions
of its; it says which nodes, and how far the job had come: should all of them be lost, the run is not taken for a new
one.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.store import Store, open_store

FOLDER = "elastic"
IDENTITY = "run.json"

_START = re.compile(r"start-(\d{5,})\.json")
_ACCOUNT = re.compile(r"timeline-(\d{5,})\.json")
_PROMISE = re.compile(r"epoch-(\d{5,})\.json")


@dataclass(frozen=True, slots=True)
class Past:
    """What earlier starts have told. `steps` are (epoch, step): how far the job came at least.

    `epoch` is the last one that is told of, and `ended` its last step if it ended in the ordinary way. `nodes` are
    those that hold versions, by the promise of the epoch that made the last one; empty if there is none.
    """

    epoch: int = 0
    steps: tuple[tuple[int, int], ...] = ()
    ended: int | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the job: its number, its nodes, and when it was last `alive`, in seconds since 1970 by its clock."""

    epoch: int = 0
    nodes: tuple[str, ...] = ()
    alive: float = 0.0


class Records:
    """The records of the run at `url`. For rank 0; all methods raise what the store raises."""

    def __init__(self, url: str) -> None:
        self._store: Store = open_store(url).child(FOLDER)
        self._turn, self._forgotten = threading.Lock(), False

    def identity(self) -> str:
        """What no other run has; made at the first start of this one. CorruptError if what is there tells none."""
        try:
            data = self._store.read(IDENTITY)
        except NotFoundError:
            doc = {"format": "run", "version": 1, "id": uuid.uuid4().hex}
            with suppress(ConflictError):  # another start was quicker: its identity is that of both
                self._store.put(IDENTITY, json.dumps(doc).encode(), if_absent=True)
            data = self._store.read(IDENTITY)
        found = run_of(data)
        if not found:
            raise CorruptError(
                f"{self._store.url}/{IDENTITY}: does not tell which run this is",
                hint="bring it back; without it the run has a new identity, and what nodes hold is not loaded",
            )
        return found

    def past(self) -> Past:
        """What is told there now."""
        names = self._store.children()
        account, promise = _last(_ACCOUNT, names), _last(_PROMISE, names)
        told, promised = self._read(f"timeline-{account:05}.json"), self._read(f"epoch-{promise:05}.json")
        steps = [(account, _whole(told.get("step"))), (promise, _whole(promised.get("step")))]
        ended = _whole(told.get("done")) if account >= promise else None
        nodes = promised.get("nodes")
        named = tuple(sorted(set(map(str, nodes)))) if isinstance(nodes, list) else ("unknown",)
        return Past(
            max(account, promise),
            tuple((epoch, step) for epoch, step in steps if step is not None),
            ended,
            named if promise else (),
        )

    def newest(self) -> Start:
        """The last start that is told of."""
        epoch = _last(_START, self._store.children())
        told = self._read(_start(epoch))
        nodes, alive = told.get("nodes"), told.get("alive")
        named = tuple(map(str, nodes)) if isinstance(nodes, list) else ("unknown",)
        return Start(epoch, named if epoch else (), float(alive) if isinstance(alive, int | float) else 0.0)

    def begin(self, epoch: int, nodes: Sequence[str]) -> Start:
        """Number this start, on `nodes`: with `epoch`, or the next one that no other start has or had."""
        while True:
            start = Start(max(epoch, self.newest().epoch + 1), tuple(sorted(set(nodes))), time.time())
            with suppress(ConflictError):  # another start was quicker
                self._store.put(_start(start.epoch), _told(start), if_absent=True)
                return start

    def alive(self, start: Start) -> None:
        """Say that `start` is alive now."""
        self._store.put(_start(start.epoch), _told(replace(start, alive=time.time())))

    def account(self, epoch: int, doc: Mapping[str, Any]) -> None:
        """Put the account of a start: an object of its own, as object stores only replace."""
        self._store.put(f"timeline-{epoch:05}.json", json.dumps(doc, indent=1).encode())

    def promise(self, epoch: int, nodes: Sequence[str], step: int) -> None:
        """Say that `nodes` hold versions, up to `step`; nothing any more once it was to be forgotten."""
        doc = {"format": "epoch", "version": 1, "nodes": list(nodes), "step": step}
        with self._turn:
            if not self._forgotten:
                self._store.put(f"epoch-{epoch:05}.json", json.dumps(doc).encode())

    def forget(self) -> None:
        """Say no longer that nodes hold anything."""
        with self._turn:
            self._forgotten = True
            for name in self._store.children():
                if _PROMISE.fullmatch(name):
                    self._store.delete(name)

    def _read(self, name: str) -> Mapping[str, Any]:
        with suppress(NotFoundError, ValueError, RecursionError):
            doc = json.loads(self._store.read(name))
            return doc if isinstance(doc, dict) else {}
        return {}


def run_of(data: bytes) -> str:
    """The identity of a run that the text of a ``run.json`` tells, "" if it tells none."""
    try:
        found = json.loads(data)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def _start(epoch: int) -> str:
    return f"start-{epoch:05}.json"


def _told(start: Start) -> bytes:
    doc = {"format": "start", "version": 1, "nodes": list(start.nodes), "alive": start.alive}
    return json.dumps(doc).encode()


def _last(pattern: re.Pattern[str], names: Sequence[str]) -> int:
    return max((int(found[1]) for name in names if (found := pattern.fullmatch(name))), default=0)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
