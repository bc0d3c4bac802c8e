"""How tensors lie on the device meshes of a live job, for the record that a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from ucp.format.spreads import LiveMesh, Spread

FLAT = "flat"
"""Placement of a tensor that is flattened together with others and cut between any two elements, as by FSDP1."""


def spread_of(mesh: DeviceMesh, placements: Iterable[Any]) -> Spread:
    """The record of a DTensor, or of what is declared to be like one."""
    return Spread(_live(mesh), tuple(str(placement) for placement in placements))


def spread_over(groups: Sequence[tuple[str, Any, str]]) -> Spread:
    """The record of a tensor that lies on process groups, (axis, group, placement) of each, without a device mesh.

    `ranks` are those of this rank's groups; where there are two, of the ranks of the last one first.
    """
    members = [distributed.get_process_group_ranks(group) for _, group, _ in groups]
    axes = tuple((axis, len(ranks)) for (axis, _, _), ranks in zip(groups, members, strict=True))
    return Spread(LiveMesh(axes, _grid(members)), tuple(placement for _, _, placement in groups))


def _grid(members: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Ranks of a mesh from those along each axis through this rank, if it is regular: a step for each axis."""
    here = distributed.get_rank()
    ranks = [here]
    for line in reversed(members):
        ranks = [rank + other - here for other in line for rank in ranks]
    return tuple(ranks)


@lru_cache(maxsize=256)
def _live(mesh: DeviceMesh) -> LiveMesh:
    names = mesh.mesh_dim_names or tuple(f"axis{number}" for number in range(mesh.ndim))
    return LiveMesh(tuple(zip(names, mesh.shape, strict=True)), tuple(mesh.mesh.flatten().tolist()))


def root_of(mesh: DeviceMesh) -> LiveMesh:
    """The mesh that `mesh` was sliced from, which has all axes of the job: those of a pipeline among them."""
    return _live(mesh._get_root_mesh())


def largest(meshes: Iterable[LiveMesh]) -> tuple[tuple[str, int], ...]:
    """Axes of the mesh of most ranks; none if there is no mesh."""
    return max((mesh.axes for mesh in meshes), key=lambda axes: math.prod(size for _, size in axes), default=())
