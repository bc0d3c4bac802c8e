"""The ranks of a save among themselves: a line of its own, which a background thread may use while training goes on."""

from __future__ import annotations

import itertools
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from ucp.errors import StorageError, UsageError
from ucp.train.team import attempt, portable

_PATIENCE = timedelta(hours=1)
"""How long a rank waits for another one that is alive, such as for the slowest to have written its shards."""

_NUMBERS: dict[str, Iterator[int]] = defaultdict(itertools.count)
"""How many channels each set of ranks has opened: they are named by it, so that all of them mean the same one."""


class Channel:
    """Messages between the ranks of `group` (by default all ranks; alone where there is no process group).

    Opening one is collective. It is gloo's whatever the backend of `group` is, no collective of training ever waits for
    it, and it outlives ``destroy_process_group``. One thread at a time may use it, on all ranks in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self._peers: Any = None
        self.rank, self.size, self.broken = 0, 1, False
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise UsageError("this rank is not in the process group that saves", hint="only its own ranks call")
        if self.size > 1:
            self._peers = _connect(group, self.rank, self.size)

    def round(self, mine: Any, answer: Callable[[Sequence[Any]], Sequence[Any]], *, purpose: str) -> Any:
        """Rank 0 makes an answer for each rank of what all of them bring, and each rank gets its own.

        If one of them brings an exception, or `answer` raises one, every rank raises it: a rank that brought one its
        own. StorageError, which names `purpose`, where a rank is gone.
        """
        with self._lost(purpose):
            found = self.gather(portable(mine, self.rank))
        answers: list[Any] = []
        if self.rank == 0:
            failed = next((one for one in found if isinstance(one, Exception)), None)
            made = failed if failed is not None else attempt(lambda: answer(found))
            answers = [portable(made, 0)] * self.size if isinstance(made, Exception) else list(made)
        with self._lost(purpose):
            given = self.scatter(answers)
        if isinstance(mine, Exception):
            raise mine
        if isinstance(given, Exception):
            raise given
        return given

    def gather(self, value: Any) -> list[Any]:
        """On rank 0 what every rank gave, with an exception in the place of a rank that is gone; elsewhere nothing."""
        if self.rank:
            self._send(self._packed(value), 0)
            return []
        return [value, *(self._heard(rank) for rank in range(1, self.size))]

    def scatter(self, values: Sequence[Any]) -> Any:
        """The value that rank 0 gives this rank: `values` there has one for each."""
        if self.rank:
            return self.receive(0)
        packed: dict[int, bytes] = {}
        for rank in range(1, self.size):
            known = packed.get(id(values[rank]))
            data = packed[id(values[rank])] = self._packed(values[rank]) if known is None else known
            with suppress(RuntimeError):  # a rank that is gone needs no answer
                self._send(data, rank)
        return values[0]

    def send(self, value: Any, rank: int) -> None:
        """Give `value` to `rank`, which receives it; RuntimeError if that one is gone."""
        self._send(pickle.dumps(value), rank)

    def receive(self, rank: int) -> Any:
        """What `rank` sends; RuntimeError if it is gone."""
        size = torch.empty(1, dtype=torch.int64)
        self._peers.recv([size], rank, 0).wait()
        data = torch.empty(int(size.item()), dtype=torch.uint8)
        self._peers.recv([data], rank, 0).wait()
        # What comes in is what another rank of this very job has made, not a file.
        return pickle.loads(data.numpy().data)  # noqa: S301, TID251

    def close(self) -> None:
        """Hang up: whoever waits for this rank is told that it is gone."""
        self.broken, self._peers = self.size > 1, None

    def _packed(self, value: Any) -> bytes:
        """`value` as it travels, or the error that it cannot: whoever waits for it must hear something."""
        found = attempt(lambda: pickle.dumps(value))
        packed: bytes = pickle.dumps(portable(found, self.rank)) if isinstance(found, Exception) else found
        return packed

    def _send(self, data: bytes, rank: int) -> None:
        self._peers.send([torch.tensor([len(data)])], rank, 0).wait()
        self._peers.send([torch.frombuffer(bytearray(data), dtype=torch.uint8)], rank, 0).wait()

    def _heard(self, rank: int) -> Any:
        try:
            return self.receive(rank)
        except RuntimeError as error:
            self.broken = True
            return _gone(f"rank {rank} is gone", error)

    @contextmanager
    def _lost(self, purpose: str) -> Iterator[None]:
        try:
            # Rank 0 goes on to tell those that are left; without a line to it there is nobody to talk to.
            if self.broken and (self.rank or self._peers is None):
                raise RuntimeError("an earlier save lost it")
            yield
        except RuntimeError as error:
            self.broken = True
            raise _gone(f"{purpose}: given up, another rank is gone", error) from error


def _gone(told: str, error: RuntimeError) -> StorageError:
    return StorageError(
        f"{told} ({str(error).splitlines()[0]})",
        hint="what was written is no checkpoint; see the log of the rank that ended first",
    )


def _connect(group: Any, rank: int, size: int) -> Any:
    from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import _get_default_store

    ranks = ",".join(map(str, distributed.get_process_group_ranks(group or distributed.group.WORLD)))
    name = f"ucp/save/{ranks}/{next(_NUMBERS[ranks])}"
    store = PrefixStore(name, _get_default_store())
    return ProcessGroupGloo(store, rank, size, _PATIENCE)
