"""The ranks of one start of a job find each other, in a store that may hold what earlier starts left."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ucp.elastic.world import World
from ucp.errors import StorageError

_PAUSE = 0.02
_LAST_WORDS = 10.0
"""Seconds that rank 0 waits at the end for the others to have heard, at most: the store may be its own."""


class Meeting:
    """All ranks of the job, spares too, on a key-value store; `store` is for this start of the job alone.

    Agents of torchrun may keep their store from one start to the next (torch/distributed/elastic/rendezvous/
    dynamic_rendezvous.py, `_shared_tcp_store_server`), with all that is in it. So every rank says hello with a word
    that nobody has said before, and rank 0 answers each with the word of this meeting.

    Making one is collective; StorageError if the others do not come within `timeout` seconds, `grouped` says that the
    process group is there already, and its store is used.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.grouped = distributed.is_available() and distributed.is_initialized()
        base = _base(world, timeout, grouped=self.grouped)
        deadline = time.monotonic() + timeout
        word = self._call(base, deadline) if world.rank == 0 else self._answered(base, deadline)
        self._prefix = f"ucp/elastic/{word}"
        self.store: Any = PrefixStore(self._prefix, base)
        self._base = base

    def gather(self, name: str, mine: Any) -> list[Any]:
        """What each rank gives (as JSON), by rank; StorageError if one does not within `timeout`. Once per `name`."""
        self.store.set(f"{name}/{self.world.rank}", json.dumps(mine))
        if self.world.rank == 0:
            self._wait([f"{name}/{rank}" for rank in range(self.world.size)], name)
            given = [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.world.size)]
            self.store.set(f"{name}/all", json.dumps(given))
            return given
        self._wait([f"{name}/all"], name)
        found: list[Any] = json.loads(self.store.get(f"{name}/all"))
        return found

    def say(self, name: str) -> None:
        """Say a word on this rank."""
        self.store.set(f"said/{name}/{self.world.rank}", "1")

    def said(self, name: str, ranks: Sequence[int]) -> bool:
        """Whether all of `ranks` have said a word."""
        return bool(self.store.check([f"said/{name}/{rank}" for rank in ranks]))

    def part(self) -> None:
        """The last word, after which nobody asks the store; where it is rank 0's, that leaves last.

        Who comes late may find nobody any more, which is no failure: all is done.
        """
        with suppress(RuntimeError):
            self.say("parted")
            if self.world.rank == 0:
                deadline = time.monotonic() + min(_LAST_WORDS, self.timeout)
                while not self.said("parted", range(self.world.size)) and time.monotonic() < deadline:
                    time.sleep(_PAUSE)

    def line(self) -> Any:
        """The same store on a connection of its own, which another thread may use; this one where there is no other."""
        try:
            return PrefixStore(self._prefix, self._base.clone())
        except (RuntimeError, NotImplementedError):
            return self.store

    def _wait(self, keys: Sequence[str], name: str) -> None:
        try:
            self.store.wait(list(keys), timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise StorageError(
                f"{name}: another rank is gone, or was not heard of for {self.timeout:g} s "
                f"({str(error).splitlines()[0]})",
                hint="see the log of the rank that ended first",
            ) from error

    def _call(self, base: Any, deadline: float) -> str:
        """Rank 0: answer everybody's hello, whoever says it, until all ranks have heard the word of this meeting."""
        word = uuid.uuid4().hex
        others = range(1, self.world.size)
        heard = [f"ucp/elastic/{word}/here/{rank}" for rank in others]
        answered: set[str] = set()
        try:
            while others and not base.check(heard):
                for rank in others:
                    hello = f"ucp/elastic/hello/{rank}"
                    if base.check([hello]) and (said := base.get(hello).decode()) not in answered:
                        base.set(f"ucp/elastic/answer/{said}", word)
                        answered.add(said)
                self._pause(deadline, "not all of the ranks have come")
        except RuntimeError as error:
            raise self._lost(error) from error
        return word

    def _answered(self, base: Any, deadline: float) -> str:
        """The word of rank 0 to this rank."""
        mine = uuid.uuid4().hex
        answer = f"ucp/elastic/answer/{mine}"
        try:
            base.set(f"ucp/elastic/hello/{self.world.rank}", mine)
            while not base.check([answer]):
                self._pause(deadline, "rank 0 does not answer")
            word: str = base.get(answer).decode()
            base.set(f"ucp/elastic/{word}/here/{self.world.rank}", "1")
        except RuntimeError as error:
            raise self._lost(error) from error
        return word

    def _pause(self, deadline: float, what: str) -> None:
        if self.world.agent is not None and os.getppid() != self.world.agent:
            raise StorageError(
                f"rank {self.world.rank} of {self.world.size}: the torchrun that started it is gone",
                hint="start the job again",
            )
        if time.monotonic() > deadline:
            raise StorageError(
                f"rank {self.world.rank} of {self.world.size}: {what} within {self.timeout:g} s",
                hint="see the logs of the others",
            )
        time.sleep(_PAUSE)

    def _lost(self, error: RuntimeError) -> StorageError:
        return StorageError(
            f"rank {self.world.rank}: the store of the rendezvous is gone ({str(error).splitlines()[0]})",
            hint="see the log of rank 0, and of its torchrun",
        )


def _base(world: World, timeout: float, *, grouped: bool) -> Any:
    if grouped:
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store()
    if world.alone:
        return HashStore()
    patience = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=patience))
    except (RuntimeError, ValueError) as error:
        raise StorageError(
            f"rank {world.rank} of {world.size} cannot reach the store of the rendezvous "
            f"({str(error).splitlines()[0]})",
            hint="see the log of rank 0; MASTER_ADDR and MASTER_PORT say where it is",
        ) from error
    store.set_timeout(patience)
    return store
