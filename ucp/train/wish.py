"""What a caller of `ucp.load` says of a job that a program describes: where this rank is, on which mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import distributed

from ucp.catalog import Catalog
from ucp.errors import UsageError
from ucp.lang import Program, from_json
from ucp.lang.ast import Sizes
from ucp.lang.bind import Placements
from ucp.lang.solve import Cuts
from ucp.layout import Mesh
from ucp.mapping import ProgramLike, as_program

SOURCE = "source"
"""As a program: the one that the checkpoint itself keeps."""

Coordinates = Mapping[str, int] | Mapping[str, Mapping[str, int]]
"""Where a rank is on the mesh; or, where it holds several virtual stages, where each is by the start of its names."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller of `ucp.load` says of the job: its program, and where on which mesh this rank is.

    `coordinates` are by the start of names, dot included; mostly there is one, for all names.
    """

    program: ProgramLike
    mesh: Mesh
    coordinates: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]
    flags: Mapping[str, bool]
    cuts: Cuts
    placements: Placements

    @classmethod
    def of(
        cls,
        program: ProgramLike,
        *,
        mesh: Mesh | Mapping[str, int] | None = None,
        coordinate: Coordinates | None = None,
        sizes: Mapping[str, int] | None = None,
        flags: Mapping[str, bool] | None = None,
        cuts: Cuts | None = None,
        placements: Placements | None = None,
    ) -> Wish:
        """Check the arguments of `ucp.load`; without a coordinate, the process group's rank tells it."""
        found = mesh if isinstance(mesh, Mesh) else Mesh(mesh or {})
        if coordinate is None:
            coordinate = _own_coordinate(found)
        given = dict(_by_prefix(coordinate))
        for axis, index in (pair for one in given.values() for pair in one.items()):
            if not 0 <= index < found[axis]:
                raise UsageError(f"coordinate {axis}={index} is not on the mesh {found}")
        return cls(program, found, given, sizes or {}, flags or {}, cuts or {}, placements or {})


def _by_prefix(coordinate: Coordinates) -> Iterator[tuple[str, Mapping[str, int]]]:
    nested = {key: value for key, value in coordinate.items() if isinstance(value, Mapping)}
    if not nested:
        yield "", cast("Mapping[str, int]", coordinate)
    elif len(nested) < len(coordinate):
        raise UsageError(f"coordinate={dict(coordinate)} mixes axes and starts of names")
    for start, one in nested.items():
        yield f"{start}." if start and not start.endswith(".") else start, one


def _own_coordinate(mesh: Mesh) -> Mapping[str, int]:
    if mesh.size == 1:
        return mesh.coordinate(0)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() == mesh.size:
        return mesh.coordinate(distributed.get_rank())
    raise UsageError(f"where on the mesh {mesh} this process is, is not known", hint="give coordinate={axis: index}")


def chosen(catalog: Catalog, wish: Wish) -> tuple[Program, Mapping[str, int], Mapping[str, bool]]:
    """The program, and the sizes and flags that come with it.

    UsageError for the program of a checkpoint that has none; ProgramError for one that is none.
    """
    if wish.program != SOURCE:
        return as_program(wish.program), {}, {}
    if catalog.program is None:
        raise UsageError(f"{catalog.url}: keeps no program", hint="give the job's own: program=...")
    program = from_json(catalog.program.ast)
    # Others were computed for the mesh of the source.
    declared = {name for statement in program.statements if isinstance(statement, Sizes) for name in statement.names}
    return program, {n: k for n, k in catalog.program.sizes.items() if n in declared}, catalog.program.flags
