"""Carrying out an exchange: read what this rank owns, and put what it wants of its own and of others' where it belongs.

In a round every owner reads some of its atoms. How the others get at them is `messages` or `shared`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ucp.layout import Box, FlatRange
from ucp.layout.block import View
from ucp.plan import Key
from ucp.run.gather import Record
from ucp.store import Store
from ucp.train.exchange.atoms import Atom, Run, Sharing
from ucp.train.exchange.buffers import seen
from ucp.train.exchange.demand import Mine, Table
from ucp.train.exchange.parts import Layouts, Message, Piece, offsets, parts_of
from ucp.train.team import attempt
from ucp.train.transfer import Block, carry, check_range, cut


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank: its number, where it reads from and how, and where what it gets belongs.

    `took` hears the seconds in which what was read by any rank was put where it belongs.
    """

    rank: int
    store: Store
    mine: Mapping[Key, Mine]
    workers: int
    record: Record
    replicas: bool
    took: Callable[[float], object] = lambda _: None


@dataclass(slots=True)
class Plan:
    """What all ranks do, known to each of them."""

    tables: Sequence[Table]
    sharing: Sharing
    rounds: list[list[Atom]]


def exchange(moving: Moving) -> int:
    """Fill everything that this rank asked for; returns the bytes that came from others. All ranks call it.

    What goes wrong on a rank is raised there when all is over: the others are not kept waiting. StorageError at once
    where a rank is gone.
    """
    rank = moving.rank
    with torch.no_grad():
        moving.run()
        if moving.error is None:
            carry(rank.store, _alone(rank, moving.plan), rank.workers, rank.record)
    if moving.error is not None:
        raise moving.error
    return moving.received


def _alone(rank: Rank, plan: Plan) -> Iterator[Block]:
    """What no other rank wants."""
    for key, runs in plan.sharing.alone[rank.rank].items():
        for run in runs:
            yield from _blocks_of(rank.mine[key], run, replicas=rank.replicas)


def _blocks_of(mine: Mine, run: Run, *, replicas: bool) -> Iterator[Block]:
    for part in parts_of(run.start, run.stop - run.start, mine.wants):
        target, (_, box) = mine.targets[part.want], mine.wants[part.want]
        region = part.here.relative_to(tuple(-a for a in box.start))
        block = Block(_at(target, part.here), region, mine.cover, mine.twins, mine.views[part.want], replicas)
        yield from cut(block)


def _at(target: torch.Tensor, box: Box) -> torch.Tensor:
    return target[tuple(map(slice, box.start, box.stop))]


@dataclass(frozen=True, slots=True)
class Lying:
    """What a rank wants of atoms, in memory: packed as a message, or as parts of the atoms, which are at `places`."""

    atoms: Sequence[Atom]
    layout: Message
    data: torch.Tensor
    places: Sequence[int] | None = None

    def numbers(self, piece: Piece, dtype: str) -> torch.Tensor:
        """The numbers of a piece, in its shape."""
        atom, part = self.atoms[piece.atom], piece.part
        if self.places is None:
            nbytes = part.here.size * atom.itemsize
            return seen(self.data[piece.offset : piece.offset + nbytes], dtype).view(part.here.shape)
        start = self.places[piece.atom]
        whole = seen(self.data[start : start + atom.nbytes], dtype)
        return whole.as_strided(part.here.shape, part.strides, whole.storage_offset() + part.at)


class Moving(ABC):
    """An exchange under way. After an `error` the rank goes on as the others expect, whatever is in its memory."""

    def __init__(self, rank: Rank, plan: Plan) -> None:
        self.rank, self.plan = rank, plan
        self.layouts = Layouts(plan.tables)
        self.received = 0
        self.error: Exception | None = None

    @abstractmethod
    def run(self) -> None:
        """All rounds. StorageError where a rank is gone."""

    @abstractmethod
    def staged(self, number: int, nbytes: int) -> torch.Tensor:
        """Memory to read round `number` into, which nobody needs any more."""

    def note(self, result: object) -> None:
        """Remember the first error."""
        if isinstance(result, Exception) and self.error is None:
            self.error = result

    def begin_reading(self, reader: ThreadPoolExecutor, number: int) -> Future[object]:
        """Begin to read what this rank owns of a round, if nothing went wrong and there is one."""
        if number >= len(self.plan.rounds) or self.error is not None:
            return reader.submit(lambda: None)
        atoms = self.owned(self.plan.rounds[number])
        places, nbytes = offsets(atoms)
        staged = self.staged(number, nbytes)
        return reader.submit(attempt, lambda: self._read(atoms, places, staged))

    def owned(self, atoms: Sequence[Atom]) -> list[Atom]:
        """Those that this rank reads."""
        return [atom for atom in atoms if atom.owner == self.rank.rank]

    def theirs(self, atoms: Sequence[Atom]) -> Iterator[tuple[int, list[Atom]]]:
        """Other ranks that own atoms which this one wants, each with those atoms."""
        by_owner: dict[int, list[Atom]] = {}
        for atom in atoms:
            by_owner.setdefault(atom.owner, []).append(atom)
        for owner, theirs in sorted(by_owner.items()):
            if owner != self.rank.rank and any(self.rank.rank in atom.ranks for atom in theirs):
                yield owner, theirs

    def _read(self, atoms: Sequence[Atom], places: Sequence[int], staged: torch.Tensor) -> None:
        found = (block for atom, at in zip(atoms, places, strict=True) for block in self._blocks(atom, staged[at:]))
        carry(self.rank.store, found, self.rank.workers, self.rank.record)

    def _blocks(self, atom: Atom, staged: torch.Tensor) -> Iterator[Block]:
        mine = self.rank.mine[atom.key]
        spec, at = mine.cover.spec, 0
        values = seen(staged[: atom.nbytes], spec.dtype)
        for box in FlatRange(atom.start, atom.length).boxes(spec.shape):
            target = values[at : at + box.size].view(box.shape)
            yield from cut(Block(target, box, mine.cover, mine.twins, View.plain(spec.shape), self.rank.replicas))
            at += box.size

    def put_away(self, found: Sequence[Lying]) -> None:
        """Copy what arrived to where it belongs, cast on the device that it ends on."""
        start = time.perf_counter()
        targets, values = [], []
        for message in found:
            for piece in message.layout.pieces:
                atom = message.atoms[piece.atom]
                target = _at(self.rank.mine[atom.key].targets[piece.part.want], piece.part.here)
                numbers = message.numbers(piece, self.dtype(atom))
                check_range(atom.key, target.dtype, numbers)
                targets.append(target)
                values.append(numbers.to(target.device))
        if targets:
            torch._foreach_copy_(targets, values)
        self.rank.took(time.perf_counter() - start)

    def dtype(self, atom: Atom) -> str:
        """That of the source."""
        return self.rank.mine[atom.key].cover.spec.dtype
