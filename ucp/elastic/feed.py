"""Feed: the samples of each optimizer step, in one order of the whole job that any number of ranks goes on in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ucp.catalog import Catalog
from ucp.elastic.batch import Batch
from ucp.errors import FitError, UsageError
from ucp.train.state.item import Item, Prepared, World
from ucp.train.state.sampler import Position, ReshardableSampler
from ucp.tree import Tree

_OWN = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "generator")
"""Arguments of a DataLoader that follow from those of a feed."""


drawn: WeakSet[Feed] = WeakSet()
"""Feeds of this process that a step was drawn from since a run began."""


class Feed(Item):
    """Gives each rank its micro-batches of `batch`, step after step, from the map-style dataset `data`.

    A step takes the next samples of one global order, that of a `ReshardableSampler` with the same `seed` and
    `shuffle`, and `position` counts what the whole job has taken: any number of ranks goes on from it. A step may run
    over the end of an epoch, so no sample is lost and none comes twice.

    It is saved and loaded with the rest of a job's state, ``{"model": model, "optimizer": optimizer, "feed": feed}``,
    under `name`; what a `ReshardableSampler` saved is gone on from as well. Only whole steps count: a step is to be
    drawn to its end before the next one, and before a save.

    `collate` makes a batch of a list of samples. `loader` are further arguments for the ``DataLoader`` that fetches,
    such as ``num_workers``: what its workers fetched ahead when the job ended is fetched again. Their seeds follow from
    `seed`, the position and the rank.
    """

    def __init__(
        self,
        data: Any,
        batch: Batch,
        *,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable[[list[Any]], Any] = default_collate,
        name: str = "sampler",
        **loader: Any,
    ) -> None:
        if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise UsageError(f"Feed: a {type(data).__name__} is no dataset with __getitem__ and __len__")
        if taken := [key for key in _OWN if key in loader]:
            raise UsageError(f"Feed: {', '.join(taken)} is not free", hint="it follows from batch, seed or collate=")
        if not loader.get("in_order", True):
            raise UsageError("Feed: in_order=False: batches may come out of order", hint="leave it out")
        self.data, self.batch, self.name = data, batch, name
        self.samples: tuple[int, ...] = ()
        self.positions: tuple[int, ...] = ()
        self._loader = {**loader, "collate_fn": collate}
        self._sampler = ReshardableSampler(data, seed=seed, shuffle=shuffle, rank=0, ranks=1)
        self._seat: tuple[int, int] | None = None
        self._orders: dict[int, Any] = {}
        self._turn = 0
        self._given: int | None = None
        self._batches: Iterator[Any] | None = None

    def place(self, rank: int, ranks: int) -> None:
        """Be the feed of data-parallel `rank` of `ranks`; a step under way is begun anew.

        UsageError where so many cannot share a step.
        """
        self.batch.share(rank, ranks)
        self._seat = rank, ranks
        self.again()

    def again(self) -> None:
        """Begin the step under way anew, if there is one: for a loop that caught an error and tries once more."""
        self._turn += 1
        self._given = self._batches = None

    @property
    def seat(self) -> tuple[int, int]:
        """The data-parallel rank that it is the feed of, and their number. UsageError before `place` in a group."""
        return self._placed()

    @property
    def position(self) -> int:
        """Samples that the whole job has taken in whole steps, since its first."""
        return self._sampler.position

    @property
    def epoch(self) -> int:
        """Which pass over the data the next sample belongs to."""
        return self.position // self._sampler.length

    @property
    def count(self) -> int:
        """Micro-batches of a step: the same on all ranks."""
        return self.batch.count(self._placed()[1])

    def step(self) -> Iterator[tuple[Any, float]]:
        """The micro-batches of this rank in the next step, each with the factor for its mean loss (`Batch.weight`).

        `samples` are then the numbers of the step's samples in the dataset, of this rank, and `positions` those in the
        order of the whole job, which never come again. The position moves on once the last micro-batch is dealt with.
        UsageError if the last step was not drawn to its end.
        """
        rank, ranks = self._placed()
        if self._given is not None:
            raise UsageError(
                f"Feed: the last step was left in micro-batch {self._given + 1} of {self.count}",
                hint="draw each step to its end; feed.again() begins it anew",
            )
        drawn.add(self)
        share, turn, end = self.batch.share(rank, ranks), self._turn, self.position + self.batch.samples
        self.positions = tuple(self.position + number for part in share for number in part)
        self.samples = tuple(self._numbers(range(self.positions[0], self.positions[-1] + 1)))
        for self._given, part in enumerate(share):
            yield self._fetch(), self.batch.weight(len(part), ranks)
            if self._turn != turn:
                raise UsageError("Feed: it was placed, loaded or begun anew while this step was under way")
        self._sampler.go_to(end, end // self._sampler.length)
        self._given = None

    def _placed(self) -> tuple[int, int]:
        if self._seat is not None:
            return self._seat
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise UsageError(
                "Feed: nobody told which samples are this rank's",
                hint="feed.place(rank, ranks), counted among data-parallel ranks",
            )
        return 0, 1

    def _fetch(self) -> Any:
        if self._batches is None:
            ahead: Any = _Ahead(self)
            seeds = torch.Generator().manual_seed(self._worker_seed())
            self._batches = iter(DataLoader(self.data, batch_sampler=ahead, generator=seeds, **self._loader))
        return next(self._batches)

    def _worker_seed(self) -> int:
        told = f"{self._sampler.seed} {self.position} {self._placed()}".encode()
        return int.from_bytes(hashlib.blake2b(told, digest_size=8, person=b"ucp.feed").digest(), "little") >> 1

    def _coming(self) -> Iterator[list[int]]:
        """Numbers in the dataset of each micro-batch of this rank from the position on, for ever."""
        share, first = self.batch.share(*self._placed()), self.position
        while True:
            for part in share:
                yield self._numbers(range(first + part.start, first + part.stop))
            first += self.batch.samples

    def _numbers(self, positions: range) -> list[int]:
        """What lies at `positions` of the global order."""
        found: list[int] = []
        while len(found) < len(positions):
            epoch, first = divmod(positions[len(found)], self._sampler.length)
            found += map(int, self._order(epoch)[first : first + len(positions) - len(found)])
        return found

    def _order(self, epoch: int) -> Any:
        if epoch not in self._orders:
            # Workers are at most an epoch ahead, unless epochs are as short as steps.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = self._sampler.order(epoch)
        return self._orders[epoch]

    @property
    def _item(self) -> Position:
        return Position(self.name, self._sampler)

    def saved(self) -> Tree:
        if self._given is not None:
            raise FitError(
                f"{self.name}: saved in the middle of a step, in micro-batch {self._given + 1} of {self.count}",
                hint="draw each step of the feed to its end before the save",
            )
        return self._item.saved()

    def told(self, catalog: Catalog) -> Tree:
        return self._item.told(catalog)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        return self._item.prepare(stored, world=world)

    def install(self, state: Any) -> None:
        self._item.install(state)
        self._orders.clear()
        self.again()


class _Ahead:
    """The batch sampler of a feed's DataLoader."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __iter__(self) -> Iterator[list[int]]:
        return self.feed._coming()
