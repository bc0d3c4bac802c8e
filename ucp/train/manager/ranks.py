"""What the ranks of a job say to each other about its checkpoints, on a gloo group of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from ucp.errors import StorageError
from ucp.train.team import attempt, portable

Found = TypeVar("Found")


class Word(NamedTuple):
    """What at least one rank says at a step boundary: that it was told to end, that its last save still runs."""

    preempted: bool
    busy: bool


class Ranks:
    """All ranks of the process group; one alone where there is none. Making one is collective, as is each method."""

    def __init__(self) -> None:
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank() if grouped else 0
        self.size: int = distributed.get_world_size() if grouped else 1
        self._group: Any = distributed.new_group(backend="gloo") if self.size > 1 else None
        self._said: tuple[Any, torch.Tensor] | None = None

    def decide(self, work: Callable[[], Found]) -> Found:
        """What `work` returns on rank 0, on every rank; what it raises there, every rank raises."""
        made: list[Any] = [portable(attempt(work), 0) if self.rank == 0 else None]
        if self._group is not None:
            with _others_alive():
                distributed.broadcast_object_list(made, src=0, group=self._group)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]  # type: ignore[no-any-return]

    def gather(self, mine: Found) -> list[Found]:
        """What every rank gives, by rank."""
        if self._group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        with _others_alive():
            distributed.all_gather_object(found, mine, group=self._group)
        return found

    def say(self, word: Word) -> None:
        """Tell the others without waiting for them; `hear` is called before the next word is said."""
        told = torch.tensor(word, dtype=torch.uint8, device="cpu")
        work = None
        if self._group is not None:
            work = distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._said = (work, told)

    def hear(self) -> Word:
        """What any rank said when all last called `say`: the same on every rank. Waits for the slowest only."""
        if self._said is None:
            return Word(preempted=False, busy=False)
        (work, told), self._said = self._said, None
        if work is not None:
            with _others_alive():
                work.wait()
        return Word(*map(bool, told.tolist()))


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StorageError(f"another rank is gone ({str(error).splitlines()[0]})", hint="see its log") from error
