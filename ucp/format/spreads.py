"""How the tensors of a saved job lay on its device meshes: a record, which nothing that reads tensors needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ucp.format.documents import Json


@dataclass(frozen=True, slots=True)
class LiveMesh:
    """A device mesh: its axes, outermost first, and the global rank at each coordinate, row-major."""

    axes: tuple[tuple[str, int], ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor lies on a mesh, by axis: ``S(0)`` cut along dim 0, ``R`` the same on all, or as torch says.

    ``flat`` is flattened together with others, and cut between any two elements.
    """

    mesh: LiveMesh
    placements: tuple[str, ...]


Chain = tuple[Spread, ...]
"""Where a tensor is cut twice, by one mesh and then each part by another, the outer one first."""


@dataclass(slots=True)
class Tables:
    """Meshes and layouts, each listed once. A layout is all chains of a tensor: one for each mesh of its replicas."""

    meshes: list[Json] = field(default_factory=list)
    layouts: list[list[list[list[object]]]] = field(default_factory=list)
    of: dict[str, int] = field(default_factory=dict)


def tables(spreads: Mapping[str, Iterable[Chain]]) -> Tables:
    """The record of tensors by name, as it goes into a manifest."""
    found, meshes, layouts = Tables(), dict[LiveMesh, int](), dict[tuple[Chain, ...], int]()
    for name, chains in spreads.items():
        layout = tuple(chains)
        if layout not in layouts:
            layouts[layout] = len(layouts)
            for mesh in (spread.mesh for chain in layout for spread in chain):
                if mesh not in meshes:
                    meshes[mesh] = len(meshes)
                    found.meshes.append({"axes": [list(axis) for axis in mesh.axes], "ranks": list(mesh.ranks)})
            rows = [[[meshes[spread.mesh], list(spread.placements)] for spread in chain] for chain in layout]
            found.layouts.append(rows)
        found.of[name] = layouts[layout]
    return found
