"""When things happened between the failure of one start of a job and the first step of the next.

Every rank keeps a small file in the folder of its node: its time of change is when the process was last alive, and in
it stands the last step that was done. The next start reads what those of the last one say.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from ucp.elastic.private import private_folder

_FOLDERS = 4
"""Of beats, of the node, of the job, of the user: ``ucp-0/job/node/beats`` (`ucp.elastic.nodes.folder_of`)."""

_BEAT_BYTES = 256
_NAME = re.compile(r"e(\d{5,})-\d{5,}")

PARTS = ("detect", "rendezvous", "start", "agree", "build", "plan", "read", "reshard", "resume")
"""What a recovery consists of, in seconds and in order.

`detect`: from when the first process was gone to when the last one was. `rendezvous`: until the first process of the
new start ran, and then until all of them had met. `start`: imports, from when this process began to when the run did.
`agree`: which version to take and which layout. `build`: model and optimizer, up to `resume`. `plan`, `read`,
`reshard`: loading. `resume`: until the first step was done.
"""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank of `size` in `epoch` left: when it was last alive, when it heard the rank after it, its last step.

    `step` is `sure` unless it is what that start itself knew no better of the one before it (`Reached`). `run` is the
    identity of the run, empty where that is not told. `lost_to` is the epoch of a start elsewhere to which that start
    had to leave the job, 0 if there was none (`ucp.elastic.fence`).
    """

    epoch: int
    rank: int
    size: int
    alive: float
    heard: float
    step: int
    sure: bool = True
    run: str = ""
    lost_to: int = 0

    @classmethod
    def of(cls, doc: Mapping[str, Any]) -> Beat:
        """As it travels."""
        epoch, rank, size, step = (int(doc[name]) for name in ("epoch", "rank", "size", "step"))
        return cls(
            epoch,
            rank,
            size,
            float(doc["alive"]),
            float(doc["heard"]),
            step,
            doc["sure"] is True,
            str(doc.get("run", "")),
            int(doc.get("lost_to", 0)),
        )

    @property
    def doc(self) -> dict[str, float | str]:
        """As it travels."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True, slots=True)
class Reached:
    """How far the job had come before this start: optimizer steps done, and maybe more unless that is `sure`."""

    step: int = 0
    sure: bool = True


def reached(beats: Iterable[Beat], told: Iterable[tuple[int, int]], *, last: int, ended: int | None = None) -> Reached:
    """How far the job had come before the start that follows epoch `last`, 0 if there was none.

    Ranks do a step together, so that what one of them left tells of all. Where every node of theirs is gone, the job
    came as far as something else tells: `told` are (epoch, step) of versions that nodes saved and of what was put
    beside the checkpoints, of which the last epoch counts, as earlier ones may have been rolled back. `ended` is the
    last step of a run that ended in the ordinary way.
    """
    beats = list(beats)
    steps = [*((beat.epoch, beat.step) for beat in beats), *told]
    newest = max((epoch for epoch, _ in steps), default=0)
    step = max([ended or 0, *(step for epoch, step in steps if epoch == newest)])
    heard = any(beat.sure for beat in beats if beat.epoch == last)
    return Reached(step, ended is not None or not last or heard)


class Pulse:
    """The file of one rank in `folder`, written in place: what a rank that was killed left is read all the same.

    Until it has done a step, it tells what was `before`: a start that comes to nothing must not make that forgotten.
    """

    def __init__(
        self, folder: str, *, epoch: int, rank: int, size: int, before: Reached = Reached(), run: str = ""
    ) -> None:
        private_folder(*os.path.split(folder))
        self._path = os.path.join(folder, f"e{epoch:05}-{rank:05}")
        self._place: dict[str, int | str] = {"epoch": epoch, "rank": rank, "size": size, "run": run}
        self._reached, self._heard = before, 0.0
        self._turn = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file: int | None = os.open(self._path, flags, 0o600)
        self._write()

    def alive(self, heard: float) -> None:
        """Say that this process is alive, and last heard the rank after it at `heard`."""
        self._heard = heard
        self._write()

    def done(self, step: int) -> None:
        """The optimizer step is done."""
        self._reached = Reached(step)
        self._write()

    def lost_to(self, epoch: int) -> None:
        """The job has to be left to the start `epoch`, which is elsewhere."""
        self._place["lost_to"] = epoch
        self._write()

    def close(self, *, remove: bool) -> None:
        """Write no more; to `remove`, also take away the file, and the folders of the job that are empty then."""
        with self._turn:
            if self._file is not None:
                os.close(self._file)
            self._file = None
        if remove:
            with suppress(OSError):
                os.unlink(self._path)
            prune(os.path.dirname(self._path))

    def _write(self) -> None:
        # Two threads write, and the number of a file that is closed may be another one's.
        with self._turn, suppress(OSError):
            doc = {**self._place, "heard": self._heard, "step": self._reached.step, "sure": self._reached.sure}
            if self._file is not None:
                os.pwrite(self._file, json.dumps(doc).encode().ljust(_BEAT_BYTES), 0)


def prune(folder: str) -> None:
    """Take away the folder of beats, and those above it that are the job's, as far as they are empty."""
    with suppress(OSError):  # others have files there
        for _ in range(_FOLDERS):
            if os.path.exists(folder):
                os.rmdir(folder)
            folder = os.path.dirname(folder)


def forget(folder: str, *, before: int) -> None:
    """Remove what ranks of epochs before a given one left on this node."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if (found := _NAME.fullmatch(name)) and int(found[1]) < before:
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def left_behind(folder: str, *, take: bool) -> list[Beat]:
    """What the ranks of earlier starts left on this node. Removed if to `take`."""
    found = []
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            with suppress(OSError, ValueError, KeyError, TypeError):
                with open(path, "rb") as file:
                    doc = json.loads(file.read(1024))
                    doc["alive"] = os.fstat(file.fileno()).st_mtime
                found.append(Beat.of(doc))
            if take:
                with suppress(OSError):
                    os.unlink(path)
    return found


def last_start(beats: Iterable[Beat]) -> list[Beat]:
    """Those of the last epoch."""
    beats = list(beats)
    newest = max((beat.epoch for beat in beats), default=0)
    return [beat for beat in beats if beat.epoch == newest]


def failure(beats: Sequence[Beat]) -> tuple[float, float] | None:
    """When the first process of a start was gone, and when the last one was; None where nothing tells.

    A node that was lost took what its ranks left with it: then the rank before them knows when it last heard one.
    """
    if not beats:
        return None
    there = {beat.rank for beat in beats}
    ends = [beat.alive for beat in beats]
    heard = [beat.heard for beat in beats if beat.heard and (beat.rank + 1) % beat.size not in there]
    return min([*ends, *heard]), max(ends)


@dataclass(slots=True)
class Timeline:
    """The times of this start, in seconds since 1970 where not said otherwise. `failed` as from `failure`."""

    began: float
    entered: float
    failed: tuple[float, float] | None = None
    met: float = 0.0
    agreed: float = 0.0
    resuming: float = 0.0
    resumed: float = 0.0
    stepped: float = 0.0
    loading: Mapping[str, float] = field(default_factory=dict)

    def parts(self) -> dict[str, float]:
        """Seconds of each part that is over, by name; see `PARTS`."""
        spans = {
            "detect": None if self.failed is None else self.failed[1] - self.failed[0],
            "rendezvous": _sum(
                0.0 if self.failed is None else max(0.0, self.began - self.failed[1]),
                _span(self.entered, self.met),
            ),
            "start": _span(self.began, self.entered),
            "agree": _span(self.met, self.agreed),
            "build": _span(self.agreed, self.resuming),
            **{name: self.loading.get(name) for name in ("plan", "read", "reshard")},
            "resume": _span(self.resumed, self.stepped),
        }
        return {name: round(max(0.0, spans[name] or 0.0), 4) for name in PARTS if spans[name] is not None}


def _span(start: float, end: float) -> float | None:
    return end - start if start and end else None


def _sum(first: float, second: float | None) -> float | None:
    return None if second is None else first + second


def process_start() -> float:
    """When this process began, in seconds since 1970: as Linux tells (proc_pid_stat(5)), else now."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        with open("/proc/uptime", "rb") as file:
            up = float(file.read().split()[0])
        return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
