"""A sampler whose place in the data is one number for the whole job, whatever the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Sampler

from ucp.catalog import Catalog
from ucp.errors import FitError, UsageError
from ucp.lazy import read_tree
from ucp.train.state.item import Item, Prepared, World
from ucp.training import progress
from ucp.tree import Tree

Tail = Literal["roll", "drop", "uneven"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One iteration over the data: ``[start, start + take)``, in samples of the whole job since the first epoch began.

    `turn` tells iterations apart.
    """

    start: int
    take: int
    turn: int


class ReshardableSampler(Sampler[int]):
    """Draws from a map-style dataset in one global order that ranks take turns in, as in ``DistributedSampler``.

    The order of epoch e follows from `seed` and e alone, and `position` counts the samples that the whole job has
    consumed, so that any number of data-parallel ranks goes on from it: none is lost, none comes twice. `data` is the
    dataset or its length. This rank is `rank` of `ranks`, or where it is on `mesh` (give the data-parallel axes of a
    job that has others), or in the process group.

    `tail` says what becomes of an epoch's last samples when they are too few for all ranks: ``"roll"``: they come
    first in the next iteration; ``"drop"``: they are left out; ``"uneven"``: some ranks get one more, which suits
    evaluation and no loop with collectives.

    Position is what training consumed, not what workers fetched ahead: iterate over a `ReshardableLoader`, or call
    `advance` after every step and `finish` after every epoch.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "roll",
        rank: int | None = None,
        ranks: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.length = data if isinstance(data, int) else len(data)
        if self.length < 1:
            raise UsageError("a sampler needs a dataset with at least one sample")
        if tail not in ("roll", "drop", "uneven"):
            raise UsageError(f"tail={tail!r}", hint="roll, drop or uneven")
        self.seed, self.shuffle, self.tail = seed, shuffle, tail
        self.rank, self.ranks = _place(rank, ranks, mesh)
        self.position = 0
        self.epoch = 0
        self._turn = 0
        self._uncounted = False

    def __len__(self) -> int:
        """Samples that this rank draws in an iteration that starts now."""
        return len(range(self.rank, self._pass().take, self.ranks))

    def __iter__(self) -> Iterator[int]:
        """Draw the samples of this rank from `position` to the end of the epoch."""
        return self._draw(self._pass())

    def _draw(self, current: Pass) -> Iterator[int]:
        at, end = current.start + self.rank, current.start + current.take
        while at < end:
            epoch, first = divmod(at, self.length)
            order = self.order(epoch)[first : first + end - at : self.ranks]
            for sample in order:
                self._uncounted = True
                yield int(sample)
            at += len(order) * self.ranks

    def order(self, epoch: int) -> Sequence[int]:
        """Numbers of all samples in the order in which the whole job draws them in `epoch`."""
        if not self.shuffle:
            return range(self.length)
        told = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=8, person=b"ucp.sampler")
        generator = torch.Generator().manual_seed(int.from_bytes(told.digest(), "little") >> 1)
        order: Any = torch.randperm(self.length, generator=generator).numpy()
        return order  # type: ignore[no-any-return]

    def _pass(self) -> Pass:
        left = max(0, self._stop - self.position)
        take = left if self.tail == "uneven" else left // self.ranks * self.ranks
        return Pass(self.position, take, self._turn)

    @property
    def _stop(self) -> int:
        return (self.epoch + 1) * self.length

    def begin(self) -> Pass:
        """What the iteration draws that starts now; one that is under way ends."""
        self._turn += 1
        return self._pass()

    def advance(self, samples: int) -> None:
        """Count `samples` of the whole job as consumed: a step's batch size times the number of ranks."""
        if samples < 0 or self.position + samples > self._stop:
            raise UsageError(f"advance({samples}) from {self.position} leaves the epoch, which ends at {self._stop}")
        self.position += samples
        self._uncounted = False

    def reach(self, current: Pass, samples: int) -> None:
        """Count the first `samples` of an iteration as consumed; UsageError if it is no longer the current one."""
        self._check(current)
        self.position = current.start + min(samples, current.take)
        self._uncounted = False

    def _check(self, current: Pass) -> None:
        if current.turn != self._turn:
            raise UsageError(
                "the sampler went on elsewhere while this iteration was under way",
                hint="iterate over one loader at a time, and anew after a load",
            )

    def finish(self, current: Pass | None = None) -> None:
        """End the epoch, of an iteration if given; `tail` says what becomes of samples that were not drawn."""
        if current is not None:
            self._check(current)
        if self.tail != "roll":
            self.position = self._stop
        self.epoch += 1
        self._uncounted = False

    def go_to(self, position: int, epoch: int) -> None:
        """Go on from `position` in `epoch`; iterations under way end."""
        self.position, self.epoch = position, epoch
        self._turn += 1
        self._uncounted = False

    @property
    def uncounted(self) -> bool:
        """Whether samples were drawn and nobody told whether they were consumed."""
        return self._uncounted


def _place(rank: int | None, ranks: int | None, mesh: DeviceMesh | None) -> tuple[int, int]:
    if (rank is None) != (ranks is None) or (rank is not None and mesh is not None):
        raise UsageError("give rank and ranks, or a mesh, or neither")
    if rank is None or ranks is None:
        if mesh is not None:
            rank, ranks = _on_mesh(mesh)
        elif distributed.is_available() and distributed.is_initialized():
            rank, ranks = distributed.get_rank(), distributed.get_world_size()
        else:
            rank, ranks = 0, 1
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} of {ranks}")
    return rank, ranks


def _on_mesh(mesh: DeviceMesh) -> tuple[int, int]:
    """A rank's number on a mesh, counted row-major, and the number of its ranks."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"this rank is not on {mesh}")
    rank = 0
    for index, size in zip(coordinate, mesh.shape, strict=True):
        rank = rank * size + index
    return rank, mesh.size()


@dataclass(frozen=True, slots=True)
class Position(Item):
    """Where a `ReshardableSampler` is: the same on all ranks."""

    name: str
    sampler: ReshardableSampler

    def saved(self) -> Tree:
        if self.sampler.uncounted:
            raise FitError(
                f"{self.name}: samples were drawn, and nobody told which of them were trained on",
                hint="iterate over ucp.ReshardableLoader(loader), or call sampler.advance(batch size * ranks)",
            )
        own = self.sampler
        return {
            "position": own.position,
            "epoch": own.epoch,
            "length": own.length,
            "seed": own.seed,
            "shuffle": own.shuffle,
        }

    def told(self, catalog: Catalog) -> Tree:
        samples = progress(catalog).consumed_samples
        if self.name in catalog.state or self.name != "sampler" or samples is None:
            return super(Position, self).told(catalog)
        return samples

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        told, own = read_tree(stored), self.sampler
        if type(told) is int:
            counted = f"{self.name}: goes on after {told} samples, in an order of its own"
            return Prepared((told, told // own.length, own.seed, own.shuffle), counted)
        state = told if isinstance(told, dict) else {}
        position, epoch, length, seed = (state.get(key) for key in ("position", "epoch", "length", "seed"))
        whole = [number for number in (position, epoch, length, seed) if isinstance(number, int)]
        if len(whole) < 4 or min(whole[:2]) < 0:
            raise FitError(f"{self.name}: the source holds no position of a ReshardableSampler there")
        if length != own.length:
            raise FitError(
                f"{self.name}: the source counted in a dataset of {length} samples, this one has {own.length}",
                hint="give the same dataset, or leave the sampler out of what is loaded",
            )
        note: str | None = None
        if (seed, state.get("shuffle")) != (own.seed, own.shuffle):
            note = f"{self.name}: order of seed {seed}, shuffle={state.get('shuffle')}, as in the source"
        return Prepared((position, epoch, seed, bool(state.get("shuffle"))), note)

    def install(self, state: Any) -> None:
        position, epoch, self.sampler.seed, self.sampler.shuffle = state
        self.sampler.go_to(position, epoch)
