"""Where this rank is among those that load, and whether it is where it was when the checkpoint was saved."""

from __future__ import annotations

from torch import distributed

from ucp.catalog import Catalog
from ucp.layout import Mesh
from ucp.train.items import World
from ucp.train.targets import Targets


def world_of(catalog: Catalog, targets: Targets) -> World:
    """The place of this rank in the job that loads `targets`, beside the mesh that saved `catalog`."""
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    mesh, saved = mesh_of(targets.axes(), size), catalog.source.mesh
    same = [axis for axis in mesh.axes if axis[1] > 1] == [axis for axis in saved.axes if axis[1] > 1]
    return World(rank, size, saved.size, same, mesh, saved)


def mesh_of(axes: tuple[tuple[str, int], ...], world: int) -> Mesh:
    """The mesh of a job of `world` ranks that lie on `axes`; one axis of all ranks where these do not tell."""
    return Mesh(axes) if Mesh(axes).size == world else Mesh({"rank": world})
