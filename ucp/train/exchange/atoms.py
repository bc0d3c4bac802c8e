"""Who wants what, and who reads it: pure arithmetic on what all ranks asked for, with the same result on each of them.

Positions are row-major ones of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ucp.layout import itemsize, numel, ravel
from ucp.plan import Key
from ucp.train.exchange.demand import Demand, Table, Want

_WHOLE = 1 - 1e-9
_SHORT = 64 << 10
_WASTE = 4
"""Reading runs of fewer than `_SHORT` bytes may read up to `_WASTE` times what is wanted (ucp/run/gather.py)."""


@dataclass(frozen=True, slots=True)
class Atom:
    """`length` elements of a tensor from position `start`, read by `owner` for all of `ranks`.

    `wanted` says how much of it the ranks want: 1.0 for each that wants all of it.
    """

    key: Key
    start: int
    length: int
    itemsize: int
    ranks: tuple[int, ...]
    wanted: float
    owner: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes in the source's dtype."""
        return self.length * self.itemsize


class Wish(NamedTuple):
    """How much of some positions a rank wants, and what it would read of them for that: parts of 1."""

    wanted: float
    read: float


_NOTHING = Wish(0.0, 0.0)


class Run(NamedTuple):
    """Positions [start, stop) that this rank reads for itself alone."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a job reads: `atoms`, in the order of the source's bytes, and by rank the runs that it alone wants."""

    atoms: tuple[Atom, ...]
    alone: tuple[dict[Key, list[Run]], ...]


def share_reads(tables: Sequence[Table], *, most: int) -> Sharing:
    """Cut what the ranks want into atoms of at most `most` bytes, and choose who reads them."""
    alone: tuple[dict[Key, list[Run]], ...] = tuple({} for _ in tables)
    load = [0.0] * len(tables)
    atoms: list[Atom] = []
    for key, asking in _by_key(tables):
        one = asking[0][1]
        size = itemsize(one.dtype)
        together = all(demand.twins == one.twins for _, demand in asking)
        for start, stop, wishes in _segments(asking):
            if together and len(wishes) > 1 and sum(wish.read for wish in wishes.values()) >= _WHOLE:
                wanted = sum(wish.wanted for wish in wishes.values())
                atom = Atom(key, start, stop - start, size, tuple(sorted(wishes)), wanted)
                atoms += _cut(atom, numel(one.shape[1:]), most)
                continue
            for rank, wish in wishes.items():
                load[rank] += wish.wanted * (stop - start) * size
                _append(alone[rank].setdefault(key, []), start, stop)
    return Sharing(tuple(_owned(atoms, load)), alone)


def _by_key(tables: Sequence[Table]) -> Iterator[tuple[Key, list[tuple[int, Demand]]]]:
    """Ranks that ask for each tensor, in the order in which the tensors lie in the source."""
    found: dict[Key, list[tuple[int, Demand]]] = {}
    for rank, table in enumerate(tables):
        for key, demand in table.items():
            if demand.wants:
                found.setdefault(key, []).append((rank, demand))
    yield from sorted(found.items(), key=lambda held: (held[1][0][1].place, held[0]))


def _segments(asking: Sequence[tuple[int, Demand]]) -> Iterator[tuple[int, int, dict[int, Wish]]]:
    """Start, stop, and how much each rank wants of what is between, wherever any rank wants something."""
    events: list[tuple[int, int, Wish]] = []
    for rank, demand in asking:
        short = _SHORT // itemsize(demand.dtype)
        for start, stop, wanted, read in intervals(demand.wants, short):
            size = stop - start
            events += [(start, rank, Wish(wanted / size, min(1.0, read / size))), (stop, rank, _NOTHING)]
    events.sort()
    wishes: dict[int, Wish] = {}
    at = 0
    for position, rank, wish in events:
        if position > at and wishes:
            yield at, position, dict(wishes)
        at = position
        if wish.wanted:
            wishes[rank] = wish
        else:
            wishes.pop(rank, None)


def intervals(wants: Iterable[Want], short: int) -> list[tuple[int, int, int, int]]:
    """Start and stop of what wants span, those that meet or touch joined, the elements wanted, and those then read.

    Runs of fewer than `short` elements are read with some of what is between them.
    """
    joined: list[tuple[int, int, int, int]] = []
    for start, stop, size, read in sorted(_span(want, short) for want in wants):
        if joined and start <= joined[-1][1]:
            first, last, held, all_read = joined[-1]
            joined[-1] = (first, max(last, stop), held + size, all_read + read)
        else:
            joined.append((start, stop, size, read))
    return joined


def _span(want: Want, short: int) -> tuple[int, int, int, int]:
    view, box = want
    start, stop = ravel(box.start, view), ravel(tuple(a - 1 for a in box.stop), view) + 1
    run = 1
    for n, size in zip(reversed(box.shape), reversed(view), strict=True):
        run *= n
        if n != size:
            break
    waste = _WASTE if run < short else 1
    return start, stop, box.size, min(stop - start, waste * box.size)


def _append(runs: list[Run], start: int, stop: int) -> None:
    if runs and runs[-1].stop == start:
        runs[-1] = Run(runs[-1].start, stop)
    else:
        runs.append(Run(start, stop))


def _cut(atom: Atom, row: int, most: int) -> Iterator[Atom]:
    """`atom` in even pieces of at most `most` bytes, whole rows where they fit: parts of those are few boxes."""
    step = max(1, most // atom.itemsize)
    if 0 < row <= step:
        step -= step % row
    for start in range(0, atom.length, step):
        yield replace(atom, start=atom.start + start, length=min(step, atom.length - start))


def _owned(atoms: Sequence[Atom], load: list[float]) -> Iterator[Atom]:
    """The atoms with owners, each of those that want it: by bytes even over all ranks, and runs of neighbours."""
    by_ranks: dict[tuple[int, ...], list[int]] = {}
    for number, atom in enumerate(atoms):
        by_ranks.setdefault(atom.ranks, []).append(number)
    owners = [0] * len(atoms)
    for ranks in sorted(by_ranks, key=lambda held: (len(held), held)):
        numbers = by_ranks[ranks]
        room = _room(ranks, load, sum(atoms[number].nbytes for number in numbers))
        at, taken = 0, 0.0
        for number in numbers:
            nbytes = atoms[number].nbytes
            while at < len(ranks) - 1 and taken + nbytes / 2 > room[at]:
                at, taken = at + 1, 0.0
            owners[number] = ranks[at]
            taken += nbytes
            load[ranks[at]] += nbytes
    return (replace(atom, owner=owner) for atom, owner in zip(atoms, owners, strict=True))


def _room(ranks: Sequence[int], load: Sequence[float], total: int) -> list[float]:
    """What each rank takes of `total` bytes so that the least loaded end up level."""
    level, loads = 0.0, sorted(load[rank] for rank in ranks)
    for count in range(1, len(loads) + 1):
        level = (total + sum(loads[:count])) / count
        if count == len(loads) or level <= loads[count]:
            break
    return [max(0.0, level - load[rank]) for rank in ranks]
