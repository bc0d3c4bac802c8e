"""What a run puts beside its checkpoints, in their folder ``elastic``: an account of each start, and what nodes hold.

``run.json`` tells this run from others that had the same URL, or job, before: who deletes the folder of a run begins
another one. ``start-00007.json`` says that epoch 7 is that of one start alone, of which run and on which nodes it is,
whether it trains, and when it last said so. ``timeline-00007.json`` is the account of epoch 7. ``epoch-00007.json`` is
there while nodes hold versions of its; it says which nodes, and how far the job had come: should all of them be lost,
the run is not taken for a new one.
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

    def ended_with(self, epoch: int) -> bool:
        """Whether the run ended in the ordinary way, in that epoch or a later one."""
        return self.ended is not None and self.epoch >= epoch


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the job: its number, its `run` and nodes; when it said that it is `alive` (seconds since 1970)."""

    epoch: int = 0
    run: str = ""
    nodes: tuple[str, ...] = ()
    trains: bool = False
    alive: float = 0.0


class Records:
    """The records of the run at `url`. For rank 0; all methods raise what the store raises."""

    def __init__(self, url: str) -> None:
        self._store: Store = open_store(url).child(FOLDER)
        self._turn, self._forgotten, self._promised = threading.Lock(), False, -1

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
        return self._started(_last(_START, self._store.children()))

    def begin(self, epoch: int, nodes: Sequence[str], *, run: str) -> Start:
        """Number this start, on `nodes`: with `epoch`, or the next one that no other start has or had."""
        while True:
            start = Start(epoch, run, tuple(sorted(set(nodes))), alive=time.time())
            with suppress(ConflictError):
                self._store.put(_start(epoch), _told(start), if_absent=True)
                last = _last(_START, self._store.children())
                if last <= epoch:
                    return start
                epoch = last
            epoch += 1

    def alive(self, start: Start) -> None:
        """Say that `start` is alive now; not where that is forgotten, as where the run was deleted."""
        if _start(start.epoch) in self._store.children():
            self._store.put(_start(start.epoch), _told(replace(start, alive=time.time())), durable=False)

    def later(self, start: Start) -> Start | None:
        """The last start after `start` that trains; one of another run if this one was deleted and begun anew."""
        epochs = sorted((_epochs(_START, self._store.children())), reverse=True)
        if start.epoch not in epochs and run_of(self._held(IDENTITY)) not in ("", start.run):
            return self._started(max(epochs, default=0))
        found = (self._started(epoch) for epoch in epochs if epoch > start.epoch)
        return next((one for one in found if one.trains and one.run == start.run), None)

    def account(self, epoch: int, doc: Mapping[str, Any]) -> None:
        """Put the account of a start: an object of its own, as object stores only replace."""
        self._store.put(f"timeline-{epoch:05}.json", json.dumps(doc, indent=1).encode())

    def promise(self, epoch: int, nodes: Sequence[str], step: int) -> None:
        """Say that `nodes` hold versions, up to `step`; not what is older, nor what was to be forgotten."""
        doc = {"format": "epoch", "version": 1, "nodes": list(nodes), "step": step}
        with self._turn:
            if not self._forgotten and step > self._promised:
                self._promised = step
                self._store.put(f"epoch-{epoch:05}.json", json.dumps(doc).encode())

    def forget(self, epoch: int) -> None:
        """Say no longer that nodes hold anything of a start up to `epoch`."""
        with self._turn:
            self._forgotten = True
            for name in self._store.children():
                if (found := _PROMISE.fullmatch(name)) and int(found[1]) <= epoch:
                    self._store.delete(name)

    def _read(self, name: str) -> Mapping[str, Any]:
        with suppress(ValueError, RecursionError):
            doc = json.loads(self._held(name))
            return doc if isinstance(doc, dict) else {}
        return {}

    def _held(self, name: str) -> bytes:
        with suppress(NotFoundError):
            return self._store.read(name)
        return b""

    def _started(self, epoch: int) -> Start:
        told = self._read(_start(epoch))
        nodes, alive = told.get("nodes"), told.get("alive")
        named = tuple(map(str, nodes)) if isinstance(nodes, list) else ("unknown",)
        when = float(alive) if isinstance(alive, int | float) else 0.0
        return Start(epoch, str(told.get("run", "")), named, told.get("trains") is True, when)


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
    doc = {"format": "start", "version": 1, "run": start.run, "nodes": list(start.nodes)}
    return json.dumps({**doc, "trains": start.trains, "alive": start.alive}).encode()


def _last(pattern: re.Pattern[str], names: Sequence[str]) -> int:
    return max(_epochs(pattern, names), default=0)


def _epochs(pattern: re.Pattern[str], names: Sequence[str]) -> list[int]:
    return [int(found[1]) for name in names if (found := pattern.fullmatch(name))]


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
