"""The one call: all ranks of a crew fill what each of them asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import distributed

from ucp.errors import ConflictError
from ucp.plan import Key
from ucp.run.gather import Record
from ucp.store import Store
from ucp.train.crew import Crew
from ucp.train.exchange.atoms import Atom, share_reads
from ucp.train.exchange.demand import Mine, Table, check_same, collect
from ucp.train.exchange.engine import Moving, Plan, Rank, exchange
from ucp.train.exchange.messages import Messaging
from ucp.train.exchange.rounds import aligned, in_rounds
from ucp.train.exchange.shared import Segments, Sharing
from ucp.train.exchange.wire import Wire
from ucp.train.transfer import Fill, settle, transfer

MEMORY = 256 << 20
"""Bytes of buffers that a rank uses for exchanging, unless it is told otherwise."""

_LARGEST = 8 << 20
_SMALLEST = 256 << 10
_LARGEST_TURN = 8 << 20
"""Memory that is used again and again need not be large."""

_BUFFERS = 6
"""Two for each of: what is read, what is sent, what arrives."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others: which checkpoint it reads, what it wants, and on which types of device."""

    source: str
    table: Table
    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Meeting:
    """The ranks of a `crew`, of which each knows what all want; `fills` are this rank's own."""

    crew: Crew
    fills: Sequence[Fill]
    mine: Mapping[Key, Mine]
    apart: Sequence[Fill]
    told: Sequence[_Told]


def meet(crew: Crew, prepare: Callable[[], tuple[str, Sequence[Fill]]], *, exchange: bool = True) -> Meeting:
    """Every rank of `crew` prepares its fills, maybe none, of the checkpoint that it names, and hears of the others'.

    What `prepare` raises on any rank, every rank raises; ConflictError where ranks name different checkpoints. Unless
    they `exchange`, each carries out its fills alone.
    """

    def tell() -> tuple[tuple[Sequence[Fill], Mapping[Key, Mine], Sequence[Fill]], _Told]:
        source, fills = prepare()
        if crew.size == 1 or not exchange:
            return (fills, {}, fills), _Told(source, {}, frozenset())
        mine, apart = collect(fills)
        devices = frozenset(fill.held.memory.device.type for fill in fills)
        return (fills, mine, apart), _Told(source, {key: one.demand() for key, one in mine.items()}, devices)

    (fills, mine, apart), told = crew.share(tell)
    _check_source([one.source for one in told])
    check_same([one.table for one in told])
    return Meeting(crew if exchange else Crew(), fills, mine, apart, told)


def fill_together(
    meeting: Meeting,
    store: Store,
    *,
    workers: int,
    record: Record,
    replicas: bool = True,
    memory: int = MEMORY,
    took: Callable[[float], object] = lambda _: None,
) -> int:
    """Carry out the fills of all ranks of a meeting: each byte that they want is read once, by one of them.

    Returns the bytes that this rank has from others. `memory` bounds the buffers by which a rank exchanges what it
    read; else as `ucp.train.transfer.transfer`. What a rank raises while reading it raises alone, when all is over: the
    caller shares it. StorageError where a rank is gone. `took` hears the seconds of each time that something which any
    rank read was put into its place.
    """
    if meeting.crew.size == 1:
        transfer(store, meeting.fills, workers=workers, record=record, replicas=replicas)
        return 0
    settle(meeting.fills)
    wire = Wire.of(_group(meeting.crew), {kind for one in meeting.told for kind in one.devices})
    rank = Rank(meeting.crew.rank, store, meeting.mine, workers, record, replicas, took)
    received = exchange(_moving(meeting, rank, wire, memory))
    transfer(store, meeting.apart, workers=workers, record=record, replicas=replicas)
    return received


def _moving(meeting: Meeting, rank: Rank, wire: Wire, memory: int) -> Moving:
    """By memory that all ranks see where there is such and messages would be on the CPU too, else by messages."""
    tables = [one.table for one in meeting.told]
    if wire.device.type == "cpu":
        room = min(memory // 2, _LARGEST_TURN)
        plan = _plan(tables, room, room // 2, sends=False)
        if not plan.rounds:
            return Messaging(rank, plan, wire)
        segments = Segments.of(meeting.crew, max(_most_read(atoms) for atoms in plan.rounds))
        if segments is not None:
            return Sharing(rank, plan, segments, wire.group)
    room = memory // _BUFFERS
    return Messaging(rank, _plan(tables, room, max(min(_SMALLEST, room), room // len(tables))), wire)


def _plan(tables: Sequence[Table], room: int, most: int, *, sends: bool = True) -> Plan:
    sharing = share_reads(tables, most=min(_LARGEST, most))
    return Plan(tables, sharing, in_rounds(sharing.atoms, len(tables), room, sends=sends))


def _most_read(atoms: Sequence[Atom]) -> int:
    """Bytes that the owner reads of `atoms` which reads most of them."""
    read: dict[int, int] = {}
    for atom in atoms:
        read[atom.owner] = read.get(atom.owner, 0) + aligned(atom.nbytes)
    return max(read.values())


def _check_source(sources: Sequence[str]) -> None:
    for rank, source in enumerate(sources):
        if source != sources[0]:
            raise ConflictError(
                f"rank 0 loads {sources[0]}, and rank {rank} {source}",
                hint="give all ranks the same source, or let each load for itself with together=False",
            )


def _group(crew: Crew) -> object:
    """The process group of a crew that is all of it."""
    (group,) = crew.groups
    assert distributed.get_world_size(group) == crew.size, "a crew of several groups cannot exchange"
    return group
