"""Which elements of an atom a rank wants, and how they lie in the message that brings them: owner and receiver agree.

A message is the parts that one rank wants of what another one reads in a round, one after the other, each contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ucp.layout import Box, FlatRange, Shape, ravel, row_major_strides
from ucp.train.exchange.atoms import Atom
from ucp.train.exchange.demand import Table, Want
from ucp.train.exchange.rounds import aligned


class Part(NamedTuple):
    """Box `here` of want number `want`: elements of the atom from position `at` on, `strides` apart."""

    want: int
    here: Box
    at: int
    strides: Shape

    def is_whole(self, atom: Atom) -> bool:
        """Whether the part is all of the atom, in its order."""
        return self.at == 0 and self.here.size == atom.length


def parts_of(start: int, length: int, wants: Sequence[Want]) -> list[Part]:
    """The parts of positions [start, start + length) that are in `wants`."""
    found = []
    for number, (view, box) in enumerate(wants):
        for run in FlatRange(start, length).boxes(view):
            hit = run.intersect(box)
            if hit is not None:
                at = ravel(hit.start, view) - start
                found.append(Part(number, hit.relative_to(box.start), at, row_major_strides(view)))
    return found


class Piece(NamedTuple):
    """A part in a message: of which atom of the round, and from which byte of the message on."""

    atom: int
    part: Part
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """What `rank` gets of atoms; `is_all` where it is those atoms themselves, one after the other as they are."""

    rank: int
    pieces: tuple[Piece, ...]
    nbytes: int
    is_all: bool


@dataclass(slots=True)
class Layouts:
    """Messages for what all ranks asked for; ranks that asked for the same share the work."""

    tables: Sequence[Table]
    _known: dict[tuple[int, int, tuple[Want, ...]], list[Part]] = field(default_factory=dict)

    def message(self, atoms: Sequence[Atom], rank: int) -> Message:
        """What `rank` gets of `atoms`, which one rank owns."""
        pieces, at, whole = [], 0, True
        for number, atom in enumerate(atoms):
            if rank not in atom.ranks:
                whole = False
                continue
            found = self._parts(atom, rank)
            whole = whole and len(found) == 1 and found[0].is_whole(atom)
            for part in found:
                pieces.append(Piece(number, part, at))
                at += aligned(part.here.size * atom.itemsize)
        return Message(rank, tuple(pieces), at, whole)

    def forget(self) -> None:
        """Let go of what is known of atoms that are done with."""
        self._known.clear()

    def _parts(self, atom: Atom, rank: int) -> list[Part]:
        wants = self.tables[rank][atom.key].wants
        key = (atom.start, atom.length, wants)
        if key not in self._known:
            self._known[key] = parts_of(atom.start, atom.length, wants)
        return self._known[key]


def offsets(atoms: Sequence[Atom]) -> tuple[list[int], int]:
    """Where each of `atoms` lies in a buffer that holds them all, and the bytes of it."""
    places, at = [], 0
    for atom in atoms:
        places.append(at)
        at += aligned(atom.nbytes)
    return places, at
