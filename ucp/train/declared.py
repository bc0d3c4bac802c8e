"""Layouts that a job declares of tensors which do not tell themselves: experts that all ranks call by the same names.

What a rank holds under such a name, whole to torch, is one part of a larger tensor: that at the rank's coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from ucp.errors import UsageError
from ucp.layout import Box, Shape
from ucp.train.held import Held
from ucp.train.meshes import root_of, spread_of
from ucp.train.names import selected

if TYPE_CHECKING:
    from ucp.train.targets import Targets

DeclaredLayout = Mapping[str, tuple[DeviceMesh, Placement | Sequence[Placement]]]
"""Globs of names, and how what they select lies on a mesh: one placement for each of its axes. The first glob wins."""


def declare(found: Targets, layout: DeclaredLayout) -> None:
    """Place the tensors of `found` that `layout` is about, optimizer states with their parameters.

    All ranks of a mesh hold parts of one size. UsageError for placements that do not fit the mesh or the tensor, and
    for a mesh that this rank is not on.
    """
    for glob, (mesh, given) in layout.items():
        placements = (given,) if isinstance(given, Placement) else tuple(given)
        coordinate = _coordinate(glob, mesh, placements)
        found.meshes.append(root_of(mesh))
        for slot in found.slots:
            first = next((other for other in layout if any(selected(name, [other]) for name in slot.names)), None)
            if first == glob:
                slot.spread = (spread_of(mesh, placements), *slot.spread)
                slot.placed = _placed(slot.held(), mesh, placements, coordinate, slot.label)


def _coordinate(glob: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> Sequence[int]:
    if len(placements) != mesh.ndim or not all(isinstance(one, Shard | Replicate) for one in placements):
        raise UsageError(
            f"layout[{glob!r}]: {tuple(map(str, placements))} on a mesh of {mesh.ndim} axes",
            hint="give one Shard(dim) or Replicate() for each axis",
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"layout[{glob!r}]: this rank is not on the mesh", hint="give each rank the mesh it is on")
    return coordinate


def _placed(
    held: Held, mesh: DeviceMesh, placements: Sequence[Placement], coordinate: Sequence[int], label: str
) -> Held:
    """What this rank holds of the larger tensor that `held` is one part of: the same memory, in a larger shape.

    Placements cut from the first axis to the last, so the last one's parts lie next to each other.
    """
    shape, start = list(held.shape), [0] * len(held.shape)
    for axis in reversed(range(mesh.ndim)):
        placement = placements[axis]
        if not isinstance(placement, Shard):
            continue
        if not -len(shape) <= placement.dim < len(shape):
            raise UsageError(f"{label}: has {len(shape)} dims, and its layout cuts dim {placement.dim}")
        start[placement.dim] += coordinate[axis] * shape[placement.dim]
        shape[placement.dim] *= mesh.size(axis)
    places = tuple(replace(place, region=_moved(place.region, tuple(start))) for place in held.places)
    return Held(tuple(shape), held.memory, places)


def _moved(region: Box, start: Shape) -> Box:
    return Box(tuple(a + b for a, b in zip(region.start, start, strict=True)), region.shape)
