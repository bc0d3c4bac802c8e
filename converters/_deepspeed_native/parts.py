"""What each tensor-parallel rank holds of a catalog: by the program that was asked for, or the source's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.errors import UsageError
from ucp.layout import Mesh

if TYPE_CHECKING:
    from ucp.lang import Program


def parts(catalog: Catalog, layout: Layout, *, tp: int) -> list[Catalog]:
    """The catalogs of ranks 0 to `tp` - 1, with the names of modules and local shapes; `catalog` itself for one.

    UsageError if it is not known how ranks cut tensors; ProgramError and FitError where the program does not fit.
    """
    program = layout.program or (_recorded(catalog) if tp > 1 else None)
    if program is None:
        return [catalog]
    # Most checkpoints need neither the language nor what it brings along.
    from ucp.mapping import scatter

    mesh = Mesh({"tp": tp})
    record = catalog.program if layout.program is None else None
    sizes = {**(record.sizes if record else {}), **layout.sizes}
    flags = {**(record.flags if record else {}), **layout.flags}
    return [_tied(part, catalog) for _, part in scatter(catalog, program, mesh=mesh, sizes=sizes, flags=flags).parts]


def _tied(part: Catalog, catalog: Catalog) -> Catalog:
    """`part` with the second names of the tensors that keep their own."""
    ties = {a: name for a, name in catalog.ties.items() if name in part.tensors and a not in part.tensors}
    return replace(part, ties=ties)


def _recorded(catalog: Catalog) -> Program:
    """The program that put the source together, where its own shards have the names of the job's modules."""
    if catalog.program is None or catalog.source.mesh["tp"] == 1 or catalog.source.mesh["pp"] > 1:
        raise UsageError(
            f"{catalog.url}: how tensor-parallel ranks cut these tensors is not known",
            hint="give a conversion program with --to-spec, whose left side names the tensors of the job's modules",
        )
    from ucp.lang import from_json

    return from_json(catalog.program.ast)


__all__ = ["parts"]
