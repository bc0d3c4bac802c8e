"""The checkpoint that a program is held against: what each coordinate of its mesh holds, as the language sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucp.errors import UsageError
from ucp.lang.ast import Program
from ucp.lang.bind import Bound, bind
from ucp.lang.held import Held
from ucp.layout import Mesh

if TYPE_CHECKING:
    from ucp.cli.command import Reading
    from ucp.cli.spec_options import Using
    from ucp.converter import Sharded
    from ucp.store import Store


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint by coordinates. ``origin[i]`` is the number of the part that ``held[i]`` is in."""

    url: str
    sharded: Sharded
    store: Store
    held: tuple[Held, ...]
    origin: tuple[int, ...]

    def bind(self, program: Program, using: Using) -> Bound:
        """Bind `program` with what the checkpoint records and what was given."""
        from ucp.mapping import known_flags

        return bind(
            program,
            self.held,
            mesh=self.sharded.mesh,
            sizes=using.sizes,
            config=self.sharded.config,
            flags={**known_flags(program, self.sharded.flags), **using.flags},
            cuts=self.sharded.cuts,
            placements=self.sharded.placements,
        )


def read_source(url: str, reading: Reading, mesh: Mesh) -> Source:
    """The checkpoint at `url`. Metadata only. UsageError for a `mesh` that is not the checkpoint's."""
    from ucp.converter import read_sharded

    sharded, store = read_sharded(url, family=reading.family, **reading.options)
    for axis, ranks in mesh.axes:
        if dict(sharded.mesh.axes).get(axis, 1) != ranks:
            raise UsageError(
                f"{url}: the mesh of its shards is {sharded.mesh}, not {axis}={ranks}",
                hint="leave --mesh out: a checkpoint knows its own",
            )
    held, origin = [], []
    for number, (coordinate, catalog) in enumerate(sharded.parts):
        for name, tensor in catalog.tensors.items():
            for state, spec in tensor.states.items():
                held.append(Held(name, spec.shape, spec.dtype, coordinate, state))
                origin.append(number)
    return Source(store.url, sharded, store, tuple(held), tuple(origin))


def mesh_text(mesh: Mesh) -> str:
    """``tp=2,pp=4``."""
    return ",".join(f"{axis}={ranks}" for axis, ranks in mesh.axes)


def at_text(coordinate: Mapping[str, int]) -> str:
    """``tp 0, pp 1``."""
    return ", ".join(f"{axis} {index}" for axis, index in coordinate.items())


__all__ = ["Source", "at_text", "mesh_text", "read_source"]
