"""An exchange between ranks of one machine: what one reads lies in memory that all see, and is copied from there.

Loopback would copy each byte several times more than the page cache, which it is to save.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed

from ucp.train.crew import Crew
from ucp.train.exchange.atoms import Atom
from ucp.train.exchange.engine import Lying, Moving, Plan, Rank
from ucp.train.exchange.parts import offsets
from ucp.train.exchange.wire import gone
from ucp.train.team import attempt

_TOKEN = 16
_PAGE = 4096
_POPULATED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""All pages at once: one by one their faults would cost more than the copies."""


class Address(NamedTuple):
    """Where other processes of the machine find memory, how much of it there is, and how they know it is that."""

    process: int
    descriptor: int
    nbytes: int
    token: bytes


class Segments:
    """The memory of each rank of a crew, this rank's own to write and the others' to read; two turns each."""

    def __init__(self, own: Address, room: int, held: Sequence[torch.Tensor]) -> None:
        self._own, self._room, self._held = own, room, held

    @classmethod
    def of(cls, crew: Crew, nbytes: int) -> Segments | None:
        """Memory with room for `nbytes` of each rank in each turn; None where the ranks do not share a machine."""
        room = -(-nbytes // _PAGE) * _PAGE
        own, addresses = crew.share(lambda: (address := _allocated(2 * room), address))
        opened = [attempt(partial(_opened, address)) for address in addresses]
        worked = not any(isinstance(one, Exception) for one in opened)
        _, all_worked = crew.share(lambda: (None, worked))
        if own is not None:
            os.close(own.descriptor)
        return cls(own, room, opened) if own is not None and all(all_worked) else None

    def turn(self, rank: int, number: int, nbytes: int) -> torch.Tensor:
        """The first bytes of the memory of a rank for round `number`."""
        start = _PAGE + self._room * (number % 2)
        return self._held[rank][start : start + nbytes]


def _allocated(nbytes: int) -> Address | None:
    """Memory without a name, which ends with the processes that use it (memfd_create(2)); None where there is none."""
    if not hasattr(os, "memfd_create"):
        return None
    token = secrets.token_bytes(_TOKEN)
    descriptor = os.memfd_create("ucp-exchange", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _PAGE + nbytes)
    os.pwrite(descriptor, token, 0)
    return Address(os.getpid(), descriptor, _PAGE + nbytes, token)


def _opened(address: Address | None) -> torch.Tensor:
    """The memory at an address; OSError where it cannot be had, or is another's."""
    if address is None:
        raise OSError("no memory to share")
    descriptor = os.open(f"/proc/{address.process}/fd/{address.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, _TOKEN, 0) != address.token:
            raise OSError("another machine's process")
        return torch.frombuffer(mmap.mmap(descriptor, address.nbytes, flags=_POPULATED), dtype=torch.uint8)
    finally:
        os.close(descriptor)


class Sharing(Moving):
    """Ranks wait for each other once in a round: then all have read it, and are done with the one before."""

    def __init__(self, rank: Rank, plan: Plan, segments: Segments, group: Any) -> None:
        super().__init__(rank, plan)
        self.segments, self.group = segments, group

    def staged(self, number: int, nbytes: int) -> torch.Tensor:
        return self.segments.turn(self.rank.rank, number, nbytes)

    def run(self) -> None:
        with ThreadPoolExecutor(1) as reader:
            reading = self.begin_reading(reader, 0)
            for number, atoms in enumerate(self.plan.rounds):
                self.note(reading.result())
                self._wait()
                reading = self.begin_reading(reader, number + 1)
                self.note(attempt(partial(self._round, number, atoms)))
                self.layouts.forget()
        if self.plan.rounds:
            self._wait()

    def _round(self, number: int, atoms: Sequence[Atom]) -> None:
        found = []
        owned = self.owned(atoms)
        for owner, held in [(self.rank.rank, owned), *self.theirs(atoms)]:
            places, nbytes = offsets(held)
            layout = self.layouts.message(held, self.rank.rank)
            found.append(Lying(held, layout, self.segments.turn(owner, number, nbytes), places))
            self.received += layout.nbytes if owner != self.rank.rank else 0
        self.put_away(found)

    def _wait(self) -> None:
        try:
            distributed.barrier(group=self.group)
        except RuntimeError as error:
            raise gone(error) from error
