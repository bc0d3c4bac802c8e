"""An exchange by messages, on any network and between any devices.

Reading of the next round, messages of this one, and putting away what came with the one before go on at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from ucp.train.exchange.atoms import Atom
from ucp.train.exchange.buffers import Buffers
from ucp.train.exchange.engine import Lying, Moving, Plan, Rank
from ucp.train.exchange.parts import offsets
from ucp.train.exchange.wire import Wire
from ucp.train.team import attempt


class Messaging(Moving):
    """Each owner sends every other rank what it wants of a round, in one message."""

    def __init__(self, rank: Rank, plan: Plan, wire: Wire) -> None:
        super().__init__(rank, plan)
        self.wire, self.buffers = wire, Buffers(wire.device)

    def staged(self, number: int, nbytes: int) -> torch.Tensor:
        return self.buffers.to_read(number, nbytes)

    def run(self) -> None:
        arrived: list[Lying] = []
        with ThreadPoolExecutor(1) as reader:
            reading = self.begin_reading(reader, 0)
            for number, atoms in enumerate(self.plan.rounds):
                self.note(reading.result())
                own = self._own(number, atoms)
                begun, coming = self._begin_messages(number, atoms, own)
                reading = self.begin_reading(reader, number + 1)
                self.note(attempt(partial(self.put_away, [own, *arrived])))
                self.wire.finish(begun)
                arrived = coming
            self.note(attempt(partial(self.put_away, arrived)))

    def _own(self, number: int, atoms: Sequence[Atom]) -> Lying:
        """What this rank reads in a round, seen as what it itself wants of it."""
        owned = self.owned(atoms)
        places, nbytes = offsets(owned)
        data = self.buffers.on_device(number, self.buffers.take("read", number, nbytes))
        return Lying(owned, self.layouts.message(owned, self.rank.rank), data, places)

    def _begin_messages(self, number: int, atoms: Sequence[Atom], own: Lying) -> tuple[list[object], list[Lying]]:
        """Begin to send and receive; also what will have arrived when that is over."""
        coming = []
        layouts = {owner: self.layouts.message(theirs, self.rank.rank) for owner, theirs in self.theirs(atoms)}
        room = self.buffers.take("arrived", number, sum(layout.nbytes for layout in layouts.values()))
        receives = {}
        for owner, theirs in self.theirs(atoms):
            data, room = room[: layouts[owner].nbytes], room[layouts[owner].nbytes :]
            if len(data):
                receives[owner] = data
                coming.append(Lying(theirs, layouts[owner], data))
        sends = self._sends(number, own)
        self.layouts.forget()
        self.received += sum(map(len, receives.values()))
        return self.wire.begin(sends, receives), coming

    def _sends(self, number: int, own: Lying) -> dict[int, torch.Tensor]:
        """What every other rank gets of what this one read: the memory it was read to where that is just it."""
        ranks = sorted({rank for atom in own.atoms for rank in atom.ranks} - {self.rank.rank})
        layouts = [layout for rank in ranks if (layout := self.layouts.message(own.atoms, rank)).nbytes]
        room = self.buffers.take("sent", number, sum(layout.nbytes for layout in layouts if not layout.is_all))
        sends = {}
        for layout in layouts:
            if layout.is_all:
                sends[layout.rank] = own.data
                continue
            sends[layout.rank], room = room[: layout.nbytes], room[layout.nbytes :]
            packed = Lying(own.atoms, layout, sends[layout.rank])
            self.note(attempt(partial(self._pack, own, packed)))
        return sends

    def _pack(self, own: Lying, packed: Lying) -> None:
        for piece in packed.layout.pieces:
            dtype = self.dtype(own.atoms[piece.atom])
            packed.numbers(piece, dtype).copy_(own.numbers(piece, dtype))
