"""The ranks that load together: what one of them finds out, all of them hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import distributed
from torch.distributed import ProcessGroup

from ucp.errors import StorageError, UsageError
from ucp.train.team import attempt, portable

Mine = TypeVar("Mine")
Shared = TypeVar("Shared")


@dataclass(frozen=True, slots=True)
class Crew:
    """The ranks of a process group, among `groups` of this rank that reach them all; without groups, it is alone."""

    rank: int = 0
    size: int = 1
    groups: list[Any] = field(default_factory=list)

    @classmethod
    def everybody(cls) -> Crew:
        """All ranks of the process group; this rank alone where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), [distributed.group.WORLD])

    @classmethod
    def of(cls, together: bool | ProcessGroup | None) -> Crew:
        """The ranks of a group that is given; else everybody, but for ``False``: this rank alone.

        UsageError for ``True`` where there is no process group, and for a group that this rank is not in.
        """
        if together is None or together is True:
            if together and not (distributed.is_available() and distributed.is_initialized()):
                raise UsageError("there is no process group to load together in", hint="leave together=True out")
            return cls.everybody()
        if together is False:
            return cls()
        if (rank := distributed.get_rank(together)) < 0:
            raise UsageError("this rank is not in the process group to load together in")
        return cls(rank, distributed.get_world_size(together), [together])

    def share(self, work: Callable[[], tuple[Mine, Shared]]) -> tuple[Mine, list[Shared]]:
        """Every rank does `work`; its first result is this rank's own, of the second each rank gets everybody's.

        What `work` raises on any rank, every rank raises; StorageError if a rank is gone.
        """
        done = attempt(work)
        found = [portable(done if isinstance(done, Exception) else done[1], self.rank)]
        for group in self.groups:
            gathered: list[Any] = [None] * distributed.get_world_size(group)
            try:
                distributed.all_gather_object(gathered, found, group=group)
            except RuntimeError as error:
                raise StorageError(
                    f"another rank is gone ({str(error).splitlines()[0]})", hint="see its log"
                ) from error
            found = [one for part in gathered for one in part]
        if isinstance(done, Exception):
            raise done
        for one in found:
            if isinstance(one, Exception):
                raise one
        return done[0], found

    def do(self, work: Callable[[], object]) -> None:
        """Every rank does `work`; what that raises on any of them, every rank raises."""
        self.share(lambda: (work(), None))
