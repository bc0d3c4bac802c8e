"""Where a run keeps its state beside storage: in the memory of its nodes, and on their disks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ucp.errors import UsageError

_SHARED_MEMORY = "/dev/shm"


def shared_memory() -> str:
    """Where this machine keeps files in memory; on those that do not, where it keeps temporary ones."""
    return _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else tempfile.gettempdir()


@dataclass(frozen=True, slots=True)
class Memory:
    """Every `every` steps the state goes to host memory of `copies` nodes: the one that has it, and others.

    A lost process costs at most `every` steps then, and those that a save takes; so do ``copies - 1`` nodes that are
    lost at once. On each node it takes `copies` times what its ranks save, twice while a save is under way, in files
    below `root`: ``/dev/shm`` where there is one, which Linux keeps in memory, else the folder for temporary files.

    A save that is due while the one before it is under way is left out, with ``busy="wait"`` training waits. One for
    which a node has no room is left out in any case; the versions that are there stay.
    """

    every: int = 10
    copies: int = 2
    root: str = field(default_factory=shared_memory)
    busy: Literal["skip", "wait"] = "skip"

    def __post_init__(self) -> None:
        _check("Memory", self.every, self.copies, self.busy)


@dataclass(frozen=True, slots=True)
class Local:
    """Every `every` steps the state goes to the disks of `copies` nodes, below the folder `root` of each.

    `busy` and full disks: as in `Memory`.
    """

    root: str
    every: int = 100
    copies: int = 1
    busy: Literal["skip", "wait"] = "skip"

    def __post_init__(self) -> None:
        _check("Local", self.every, self.copies, self.busy)


def _check(name: str, every: int, copies: int, busy: str) -> None:
    if busy not in ("skip", "wait"):
        raise UsageError(f"{name}(busy={busy!r})", hint='"skip" or "wait"')
    if every < 1 or copies < 1:
        raise UsageError(f"{name}(every={every}, copies={copies}): both must be at least 1")


def told_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank was given, as it travels; without folders, which may be other ones on other nodes."""
    return {name: None if one is None else _told(one) for name, one in asked.items()}


def _told(one: Any) -> str:
    return f"every={one.every}, copies={one.copies}, busy={one.busy}" if isinstance(one, Memory | Local) else str(one)


def check_alike(asked: Sequence[Mapping[str, Any]]) -> None:
    """UsageError unless all ranks, by number, were given the same: else they would wait for each other in vain."""
    for rank, mine in enumerate(asked):
        for name, value in mine.items():
            if value != asked[0][name]:
                raise UsageError(
                    f"rank {rank} was given {name}={value}, and rank 0 {name}={asked[0][name]}",
                    hint="start the same script with the same arguments on all nodes",
                )
