"""Which of a policy's layouts fits: ranks, divisibility, the batch, and memory as a checkpoint tells. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import Catalog
from ucp.elastic.batch import MODEL_AXES, Batch, seat
from ucp.elastic.policy import Policy
from ucp.errors import UsageError
from ucp.layout import Mesh, itemsize

AXES = ("pp", "dp", "dp_shard", "fsdp", "tp")
"""Axes that divide parameters unless a job says otherwise: those of FSDP, with or without tensor parallelism."""

_TOLD = 3
"""Refused layouts that a line of the log tells in full: there may be as many as ranks."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a layout has to fulfil, beside having no more ranks than there are.

    `divides`: numbers that the size of an axis has to divide, such as ``{"tp": [heads, hidden], "pp": [layers]}``.
    `memory`: bytes that a rank has for parameters, gradients and optimizer states; None: not checked. `values`,
    `gradients` and `states` are the axes that divide these; where None, gradients and states are divided as values are.
    ZeRO-1 has ``values=("pp", "tp"), states=("pp", "tp", "dp")``, DDP ``values=()``. `rows`: whether ranks share a
    tensor by whole rows of its dim 0, as FSDP2's do, or evenly, as ZeRO's. `data`: see `ucp.elastic.seat`.
    """

    divides: Mapping[str, Sequence[int]] = field(default_factory=dict)
    memory: float | None = None
    values: Collection[str] = AXES
    gradients: Collection[str] | None = None
    states: Collection[str] | None = None
    rows: bool = True
    data: Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("values", "gradients", "states", "data"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"Needs: {name}={getattr(self, name)!r}", hint=f"give a tuple of axes: {name}=('dp',)")
        given: Mapping[str, Any] = self.divides
        for axis, numbers in given.items():
            if not isinstance(numbers, Sequence) or not all(type(number) is int for number in numbers):
                raise UsageError(f"Needs: divides {axis!r}: {numbers!r}", hint='for example divides={"tp": [heads]}')


@dataclass(frozen=True, slots=True)
class Choice:
    """The layout that was chosen: ranks from ``mesh.size`` on are `spares`.

    `refused` are the layouts that the policy likes better, each with the reason against it. `estimate` is what each
    rank needs in bytes (`estimate`), None where no checkpoint was there to tell.
    """

    mesh: Mesh
    spares: int
    refused: tuple[tuple[Mesh, str], ...] = ()
    estimate: int | None = None

    @property
    def world(self) -> int:
        """Ranks of the job, spares among them."""
        return self.mesh.size + self.spares

    def __str__(self) -> str:
        spares = f", {self.spares} spare" if self.spares else ""
        memory = "" if self.estimate is None else f", about {_size(self.estimate)} of state per rank"
        refused = "".join(f"; not {mesh}: {reason}" for mesh, reason in self.refused[:_TOLD])
        more = len(self.refused) - _TOLD
        refused += f"; nor {more} others down to {self.refused[-1][0]}" if more > 0 else ""
        return f"{self.mesh} on {_ranks(self.world)}{spares}{memory}{refused}"


def choose(
    policy: Policy,
    world: int,
    *,
    batch: Batch | None = None,
    needs: Needs | None = None,
    catalog: Catalog | None = None,
) -> Choice:
    """The first layout of `policy` that fits `world` ranks.

    `batch` has to leave no micro-batch empty, `needs` to be fulfilled; its memory is checked where `catalog`, the
    checkpoint to go on from, tells how much there is. UsageError, with every layout tried and why it does not fit, if
    there is none.
    """
    if world < 1:
        raise UsageError(f"a layout for {world} ranks")
    needs, amounts = Needs() if needs is None else needs, None if catalog is None else _amounts(catalog)
    refused: dict[Mesh, str] = {}
    for mesh in policy.layouts(world):
        nbytes = None if amounts is None else _bytes(amounts, mesh, needs)
        reasons = tuple(_against(mesh, world, batch, needs, nbytes))
        if not reasons:
            return Choice(mesh, world - mesh.size, tuple(refused.items()), nbytes)
        refused[mesh] = "; ".join(reasons)
    tried = [f"  {mesh}: {reason}" for mesh, reason in refused.items()] or [f"  {policy} gives none"]
    raise UsageError(
        "\n".join([f"no layout fits {_ranks(world)}:", *tried]),
        hint="give the job more ranks, or a policy with other layouts",
    )


def _against(mesh: Mesh, world: int, batch: Batch | None, needs: Needs, nbytes: int | None) -> Iterator[str]:
    """What speaks against a layout."""
    if mesh.size > world:
        yield f"takes {_ranks(mesh.size)}"
    for axis, numbers in needs.divides.items():
        odd = [str(number) for number in numbers if number % mesh[axis]]
        if odd:
            yield f"{axis}={mesh[axis]} does not divide {' or '.join(odd)}"
    if batch is not None:
        problem = batch.problem(seat(mesh, 0, needs.data)[1])
        if problem is not None:
            yield problem
    if nbytes is not None and needs.memory is not None and nbytes > needs.memory:
        yield f"takes about {_size(nbytes)} per rank, which has {_size(needs.memory)}"


def estimate(catalog: Catalog, mesh: Mesh, needs: Needs | None = None) -> int:
    """Bytes of parameters, gradients and optimizer states on a rank of `mesh`, as far as a checkpoint tells.

    It is that of the rank with the most. Every tensor counts with the dtypes and states that it has in `catalog`, a
    parameter once more for its gradient, in the dtype of its value; a job that computes in a lower precision than it
    saves has these in other places, and about as many bytes. Tensors are cut along the axes that `needs` names: by
    tensor parallelism those of two dims and more, by stages of a pipeline none. Stages have as many layers each, one of
    them the largest tensor besides; buffers lie whole on each.

    Left out: activations, what layers gather while they compute, buffers of communication, such as DDP's buckets,
    larger tensors that tensor parallelism does not cut, less even stages, and what else a process has. So give
    `Needs.memory` what is left after those.
    """
    return _bytes(_amounts(catalog), mesh, Needs() if needs is None else needs)


Held = tuple[str, int]
"""A use of memory (a field of `Needs`, or ``buffers``), and the item size that a tensor has there."""

Amounts = Counter[tuple[tuple[int, ...], tuple[Held, ...]]]
"""How many tensors there are of a shape that are held so.

Models have thousands of tensors and few kinds of them, and a policy may have thousands of layouts.
"""


def _amounts(catalog: Catalog) -> Amounts:
    found: Amounts = Counter()
    for tensor in catalog.tensors.values():
        shapes: dict[tuple[int, ...], list[Held]] = {}
        for state, spec in tensor.states.items():
            use = "buffers" if tensor.kind == "buffer" else "values" if state == "value" else "states"
            held = shapes.setdefault(spec.shape, [])
            held.append((use, itemsize(spec.dtype)))
            if use == "values" and tensor.kind == "parameter":
                held.append(("gradients", itemsize(spec.dtype)))
        found.update((shape, tuple(held)) for shape, held in shapes.items())
    return found


def _bytes(amounts: Amounts, mesh: Mesh, needs: Needs) -> int:
    """Of each use: what one stage of a pipeline has in the mean, and the largest tensor in place of its mean."""
    axes = {"values": needs.values, "gradients": needs.gradients, "states": needs.states, "buffers": ("pp",)}
    ways = {use: _ways(mesh, needs.values if named is None else named) for use, named in axes.items()}
    every = mesh["pp"]  # bytes of as many stages are counted, in whole numbers: floats end beside the sum
    total = largest = 0
    for (shape, held), count in amounts.items():
        staged = 0
        for use, width in held:
            stages, data, model = ways[use]
            nbytes = _elements(shape, data, model, rows=needs.rows) * width
            total += nbytes * count * (every // stages)
            staged += nbytes * (every - every // stages)
        largest = max(largest, staged)
    return -(-(total + largest) // every)


def _ways(mesh: Mesh, axes: Collection[str]) -> tuple[int, int, int]:
    """Between how many stages tensors lie, and how often each is cut: also those of one dim, and the others besides."""
    stages, data, model = 1, 1, 1
    for axis in set(axes):
        if axis == "pp":
            stages *= mesh[axis]
        elif axis in MODEL_AXES:
            model *= mesh[axis]
        else:
            data *= mesh[axis]
    return stages, data, model


def _elements(shape: tuple[int, ...], data: int, model: int, *, rows: bool) -> int:
    """The most elements that a rank has of a tensor: cut by `model` along dim 0 or dim 1, by `data` along dim 0."""
    if len(shape) < 2:
        return -(-math.prod(shape) // data)
    if not rows:
        return -(-math.prod(shape) // (data * model))
    first, second, *others = shape
    columns_whole = -(-first // (data * model)) * second
    columns_cut = -(-first // data) * -(-second // model)
    return max(columns_whole, columns_cut) * math.prod(others)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
