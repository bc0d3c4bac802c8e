"""What each rank of the elastic demo writes down while it trains, for the ledger: lines that survive a SIGKILL."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ucp.errors import UcpError

RECORDS = "records"
"""Folder with a file for each process."""
History = tuple[tuple[int, int], ...]
"""What a state descends from: (epoch, step it went on from) of every epoch that had a part in it, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is said of every record: when (seconds since 1970), and by whom."""

    what: ClassVar[str]
    time: float
    node: str
    pid: int
    epoch: int
    rank: int
    dp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start(Record):
    """A rank is in the job: the ranks are `world`, those that train are laid out in `mesh`."""

    what: ClassVar[str] = "start"
    world: int
    mesh: Mapping[str, int]
    spare: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Record):
    """A rank has the state of `step`, from `tier` (``none``: from nowhere), and what this state descends from now."""

    what: ClassVar[str] = "resume"
    step: int
    tier: str
    reconfigured: bool
    history: History
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Record):
    """A rank has done `step` with `samples`; `loss` is the sum of their losses."""

    what: ClassVar[str] = "step"
    step: int
    samples: tuple[int, ...]
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Record):
    """The first step after a recovery is done; seconds of its parts, as the run has measured them."""

    what: ClassVar[str] = "recovered"
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Record):
    """A rank has come to the end."""

    what: ClassVar[str] = "end"
    step: int
    history: History


_KINDS: dict[str, type[Record]] = {kind.what: kind for kind in (Start, Resume, Step, Recovered, End)}


class Recorder:
    """Writes the records of this process below `folder`; nothing where there is none."""

    def __init__(self, folder: Path | None, node: str) -> None:
        self._node, self._file, self._common = node, -1, {"epoch": 0, "rank": -1, "dp": -1}
        if folder is not None:
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
            path = folder / RECORDS / f"{node}.{os.getpid()}.{time.time_ns()}"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @classmethod
    def from_environment(cls) -> Self:
        """As the cluster that runs this process wants it (UCP_DEMO_FOLDER, UCP_NODE)."""
        folder = os.environ.get("UCP_DEMO_FOLDER")
        return cls(Path(folder) if folder else None, os.environ.get("UCP_NODE", "node"))

    def start(
        self, *, epoch: int, rank: int, world: int, mesh: Mapping[str, int], dp: int = -1, spare: bool = False
    ) -> None:
        """The process is `rank` of `world`; `dp` is its number among those that get different samples."""
        self._common = {"epoch": epoch, "rank": rank, "dp": dp}
        self._write("start", world=world, mesh=dict(mesh), spare=spare)

    def resume(
        self,
        *,
        step: int,
        tier: str,
        reconfigured: bool,
        history: Sequence[Sequence[int]],
        parts: Mapping[str, float],
    ) -> None:
        """The state is that of `step`."""
        self._write(
            "resume", step=step, tier=tier, reconfigured=reconfigured, history=[*map(list, history)], parts=dict(parts)
        )

    def step(self, *, step: int, samples: Sequence[int], loss: float) -> None:
        """`step` is done, and nothing of it is saved yet."""
        self._write("step", step=step, samples=list(samples), loss=loss)

    def recovered(self, *, parts: Mapping[str, float]) -> None:
        """The first step of this epoch is done."""
        self._write("recovered", parts=dict(parts))

    def end(self, *, step: int, history: Sequence[Sequence[int]]) -> None:
        """All is done."""
        self._write("end", step=step, history=[*map(list, history)])

    def _write(self, what: str, **said: Any) -> None:
        if self._file >= 0:
            common = {"what": what, "time": time.time(), "node": self._node, "pid": os.getpid(), **self._common}
            # One call: a process that is killed has written all of a line or nothing of it.
            os.write(self._file, (json.dumps({**common, **said}) + "\n").encode())


def read(folder: Path) -> list[Record]:
    """All records below `folder`, in order of time. UcpError for what is none."""
    reader = Reader(folder)
    return sorted(reader.more(), key=lambda record: record.time)


class Reader:
    """Reads records while they are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / RECORDS
        self._read: dict[str, int] = {}

    def more(self) -> Iterator[Record]:
        """What was written since the last time, file by file."""
        names = sorted(os.listdir(self._folder)) if self._folder.is_dir() else []
        for name in names:
            with open(self._folder / name, "rb") as file:
                file.seek(self._read.get(name, 0))
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if line.endswith(b"\n"):
                    self._read[name] = self._read.get(name, 0) + len(line)
                    yield parsed(line)


def parsed(line: bytes | str) -> Record:
    """The record of one line. UcpError if it is none."""
    try:
        said = json.loads(line)
        kind = _KINDS[said.pop("what")]
        names = {field.name for field in fields(kind)}
        found = kind(**{name: _frozen(value) for name, value in said.items() if name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UcpError(f"no record of the elastic demo: {line!r}") from error
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
