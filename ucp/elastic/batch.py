"""The global batch: the same samples in each optimizer step, whatever the number of ranks that share them. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ucp.errors import UsageError
from ucp.layout import Mesh

DATA_AXES = frozenset({"dp", "dp_replicate", "dp_shard", "ddp", "fsdp"})
"""Axes whose ranks train on samples of their own."""

MODEL_AXES = frozenset({"tp", "pp", "cp", "sp"})
"""Axes whose ranks work on the same samples together."""


def seat(mesh: Mesh, rank: int, data: Collection[str] | None = None) -> tuple[int, int]:
    """Where `rank` of `mesh` is among those that train on different samples, and how many there are of these.

    `data` says along which axes samples differ; without it that follows from the usual names (`DATA_AXES`, and not
    `MODEL_AXES`), and an axis of another name is a UsageError: ranks that see the same samples by mistake learn less,
    and nobody is told.
    """
    if isinstance(data, str):
        raise UsageError(f"seat: data={data!r}", hint="give a tuple of axes, such as data=('dp',)")
    axes = tuple((name, size) for name, size in mesh.axes if _carries_samples(name, data))
    left = [name for name, size in mesh.axes if name in DATA_AXES and size > 1]
    if left and not axes:
        raise UsageError(
            f"seat: none of data={tuple(data or ())} is an axis of {mesh}, and all ranks would see the same samples",
            hint=f"name {' and '.join(left)}, or leave data= out",
        )
    seats = Mesh(axes)
    return seats.rank(mesh.coordinate(rank)), seats.size


def _carries_samples(axis: str, data: Collection[str] | None) -> bool:
    if data is not None:
        return axis in data
    if axis not in DATA_AXES | MODEL_AXES:
        raise UsageError(f"axis {axis!r}: do its ranks train on samples of their own?", hint="data= names all that do")
    return axis in DATA_AXES


@dataclass(frozen=True, slots=True)
class Batch:
    """`samples` of one optimizer step of the whole job, the same for ever, and the most of a micro-batch, `micro`.

    Ranks that share a step have the same number of micro-batches, as collectives within them need; their sizes differ
    by one sample at most. Gradients are those of the whole batch if each micro-batch's mean loss is multiplied by its
    `weight`, gradients of micro-batches are added up, and ranks are averaged as DDP and FSDP do. That is exact where
    the loss of a micro-batch is the mean over its samples; one that is a mean over tokens, of which samples have
    different numbers, has to be made one of samples first.
    """

    samples: int
    micro: int

    def __post_init__(self) -> None:
        for name in ("samples", "micro"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"Batch: {name}={value!r}", hint="give a whole number of at least 1")

    def count(self, ranks: int) -> int:
        """Micro-batches that each of `ranks` has in a step: as few as `micro` allows."""
        return -(-self.samples // (ranks * self.micro))

    def problem(self, ranks: int) -> str | None:
        """Why `ranks` cannot share a step, or None: some micro-batch would have no sample."""
        count = self.count(ranks)
        parts = ranks * count
        if parts <= self.samples:
            return None
        each = f"{count} micro-batch{'es' * (count > 1)} of at most {self.micro} on each of {ranks} ranks"
        return f"{self.samples} samples of a step are too few for {each}: {parts - self.samples} would be empty"

    def share(self, rank: int, ranks: int) -> tuple[range, ...]:
        """The micro-batches of `rank`: numbers of samples within the step. UsageError where the ranks do not fit."""
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} of {ranks}")
        if (problem := self.problem(ranks)) is not None:
            raise UsageError(problem, hint="more samples per step, larger micro-batches, or fewer data-parallel ranks")
        count = self.count(ranks)
        cuts = [part * self.samples // (ranks * count) for part in range(rank * count, (rank + 1) * count + 1)]
        return tuple(map(range, cuts, cuts[1:]))

    def shares(self, ranks: int) -> tuple[tuple[range, ...], ...]:
        """The micro-batches of all `ranks`, by rank. UsageError where the ranks do not fit."""
        return tuple(self.share(rank, ranks) for rank in range(ranks))

    def weight(self, size: int, ranks: int) -> float:
        """The factor for the mean loss of a micro-batch of `size` samples where gradients are averaged over `ranks`.

        Weights of all micro-batches add up to `ranks`: the mean loss of a step is that of the weighted ones' sum.
        A loss of few bits, such as bfloat16, is to be made ``loss.float()`` first: the factor would be rounded to its
        bits, and all gradients with it.
        """
        return size * ranks / self.samples
