"""One state of one tensor as a rank of a live job holds it: boxes of the whole, and the memory that each lies in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ucp.errors import FitError
from ucp.layout import Box, FlatRange, Shape
from ucp.layout.region import numel
from ucp.train.shards import Part, local_tensor, parts

FlatRun = tuple[int, int, int]
"""First element in the whole tensor's row-major order, first element in a rank's flat memory, number of elements."""


@dataclass(frozen=True, slots=True)
class Place:
    """Box `region` of a whole tensor lies in a rank's memory: in box `local` of it, or, flat, from an element on.

    The memory may lack dims in which the region has size 1, such as those of stacked layers.
    """

    region: Box
    local: Box | int


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of a tensor of `shape`: `memory`, a plain local tensor, of which `places` says what is where.

    Writes to `memory` and to views of it change the job. Elements in no place are padding.
    """

    shape: Shape
    memory: torch.Tensor
    places: tuple[Place, ...]

    def views(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """Each box of the whole that this rank holds, with the memory of the same shape that it lies in."""
        for place in self.places:
            yield place.region, _view(self.memory, place)

    def of(self, memory: torch.Tensor) -> Held:
        """The same places in other memory of the same local shape, such as an optimizer's state."""
        assert memory.shape == self.memory.shape, f"{list(memory.shape)} beside {list(self.memory.shape)}"
        return replace(self, memory=memory)


def held(tensor: torch.Tensor, label: str) -> Held:
    """What this rank holds of a plain tensor or a DTensor.

    FitError, which names `label`, for what has no plain memory and for placements that tell no boxes.
    """
    places = tuple(Place(part.region, part.local) for part in parts(tensor, label))
    return Held(tuple(tensor.shape), local_tensor(tensor, label), places)


def in_parts(shape: Shape, memory: torch.Tensor, found: Iterable[Part]) -> Held:
    """What a rank holds of a tensor of `shape` where the framework says itself which box is where in `memory`."""
    return Held(shape, memory, tuple(Place(part.region, part.local) for part in found))


def flat_held(shape: Shape, memory: torch.Tensor, runs: Iterable[FlatRun]) -> Held:
    """What a rank holds of a flattened tensor, as FSDP1 and ZeRO keep them: `runs` of it in the 1-D `memory`.

    FitError for runs outside the tensor or the memory.
    """
    if memory.ndim != 1 or not memory.is_contiguous():
        raise FitError(f"flat memory has one dim and no gaps, not shape {list(memory.shape)}")
    places = []
    for first, start, length in runs:
        if min(first, start, length) < 0 or first + length > numel(shape) or start + length > memory.numel():
            raise FitError(f"{length} elements from {first} of {list(shape)} at {start} of {memory.numel()}")
        at = start
        for box in FlatRange(first, length).boxes(shape):
            places.append(Place(box, at))
            at += box.size
    return Held(shape, memory, tuple(places))


def _view(memory: torch.Tensor, place: Place) -> torch.Tensor:
    if isinstance(place.local, int):
        return memory[place.local : place.local + place.region.size].view(place.region.shape)
    here = memory[tuple(slice(a, b) for a, b in zip(place.local.start, place.local.stop, strict=True))]
    return here.view(place.region.shape)
