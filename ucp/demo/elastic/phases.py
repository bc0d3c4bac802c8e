"""Where a job is, so that it can be killed exactly there: an order makes the process stop itself at a phase.

Orders are files below the job's folder, one per rank: ``orders/<node>.<local rank>`` with the name of a phase and how
many seconds after its beginning to stop. The process renames it to ``reached/…`` and sends itself SIGSTOP; whoever
gave the order kills it, or has it continue.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

START, FORWARD, OPTIMIZER = "start", "forward", "optimizer"
STAGING, REPLICATION, WRITING, COMMIT = "staging", "replication", "writing", "commit"
RECOVERY, READING = "recovery", "reading"
PHASES = (FORWARD, OPTIMIZER, STAGING, REPLICATION, WRITING, COMMIT, START, RECOVERY, READING)
"""What a job passes through; `WRITING` is to a place that is not the nodes' memory."""
_MEMORY = "nodes://memory"
_HOLD, _LOOK = "hold", 0.05


class Phases:
    """The phases of this process, which is a rank of a job; without a `folder` nobody gives orders."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._order = folder and folder / "orders" / name
        self._hold = folder and folder / _HOLD
        self._reached = folder and folder / "reached" / name

    @classmethod
    def from_environment(cls) -> Self:
        """As the cluster that runs this process wants it (UCP_DEMO_FOLDER, UCP_NODE)."""
        folder = os.environ.get("UCP_DEMO_FOLDER")
        name = name_of(os.environ.get("UCP_NODE", "node"), int(os.environ.get("LOCAL_RANK", "0")))
        return cls(Path(folder) if folder else None, name)

    def reach(self, phase: str) -> None:
        """`phase` begins."""
        if self._order is None or self._reached is None or not self._order.exists():
            return
        with suppress(OSError, ValueError):
            wanted, _, delay = self._order.read_text().partition(" ")
            if wanted == phase:
                # Only one thread of this process gets it.
                self._order.rename(self._order.with_suffix(".taken"))
                self._stop(float(delay or 0))

    def wait(self, epoch: int, step: int, world: int) -> None:
        """Begin `step` in `epoch`, on `world` ranks, only when nobody holds the job up before it."""
        while self._hold is not None and _held(self._hold, epoch, step, world):
            time.sleep(_LOOK)

    def watch_saves(self) -> None:
        """Have the phases of saves and of loading announced, in whatever thread they are."""
        from ucp.elastic.nodes import NodesStore
        from ucp.train.save.job import Job
        from ucp.train.save.native import NativeForm

        def written_to(_: Any, task: Any) -> str:
            return REPLICATION if task.store.url.startswith(_MEMORY) else WRITING

        self._watch(Job, "_stage", STAGING)
        self._watch(NativeForm, "write", written_to)
        self._watch(NativeForm, "write", COMMIT, after=True)
        self._watch(NativeForm, "commit", COMMIT)
        self._watch(NodesStore, "read_ranges", READING)

    def _watch(self, owner: type, method: str, phase: str | Callable[..., str], *, after: bool = False) -> None:
        """Reach `phase`, or what it gives for the arguments, before or after `method` of `owner`."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def announced(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self.reach(phase if isinstance(phase, str) else phase(*args, **kwargs))
            found = inner(*args, **kwargs)
            if after:
                self.reach(phase if isinstance(phase, str) else phase(*args, **kwargs))
            return found

        setattr(owner, method, announced)

    def _stop(self, delay: float) -> None:
        if delay:
            threading.Thread(target=self._stop_after, args=(delay,), daemon=True).start()
        else:
            self._stop_after(0)

    def _stop_after(self, delay: float) -> None:
        assert self._reached is not None
        if delay:
            time.sleep(delay)
        self._reached.parent.mkdir(exist_ok=True)
        self._reached.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


class Orders:
    """The other side: orders for the ranks of a job whose folder is `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def give(self, node: str, local_rank: int, phase: str, *, delay: float = 0.0) -> None:
        """Have this rank stop `delay` seconds after it has reached `phase` the next time."""
        self.withdraw(node, local_rank)
        path = self._path("orders", node, local_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(f"{phase} {delay}")
        new.rename(path)

    def reached(self, node: str, local_rank: int) -> int | None:
        """Number of the process that has stopped there; None: it has not."""
        with suppress(FileNotFoundError, ValueError):
            return int(self._path("reached", node, local_rank).read_text())
        return None

    def withdraw(self, node: str, local_rank: int) -> None:
        """No order for this rank any more."""
        for path in (self._path("orders", node, local_rank), self._path("reached", node, local_rank)):
            path.unlink(missing_ok=True)

    def hold(self, *, step: int, epoch: int = sys.maxsize, but: int = 0) -> None:
        """Epochs up to `epoch` do not go beyond `step`, until `release`: what is coming may take its time.

        Those of `but` ranks may: they are what is waited for.
        """
        new = self._folder / f"{_HOLD}.new"
        new.write_text(f"{epoch} {step} {but}")
        new.rename(self._folder / _HOLD)

    def release(self) -> None:
        """Nobody is held up any more."""
        (self._folder / _HOLD).unlink(missing_ok=True)

    def _path(self, kind: str, node: str, local_rank: int) -> Path:
        return self._folder / kind / name_of(node, local_rank)


def _held(path: Path, epoch: int, step: int, world: int) -> bool:
    try:
        last, until, but = map(int, path.read_text().split())
    except FileNotFoundError:
        return False
    return epoch <= last and step > until and world != but


def name_of(node: str, local_rank: int) -> str:
    """Name of the files of a rank."""
    return f"{node}-{local_rank}.rank"
