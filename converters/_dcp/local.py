"""Names that a job has: a catalog as a conversion program's left side sees it, each tensor whole."""

from __future__ import annotations

from dataclasses import replace

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.lang.ast import Flags
from ucp.layout import Mesh
from ucp.mapping import scatter


def localized(catalog: Catalog, layout: Layout) -> Catalog:
    """`catalog` through the program of `layout`, if it has one, without any axis: DCP knows tensors as wholes.

    Sizes and flags that the layout does not give are those that the source was consolidated with. ProgramError and
    FitError as `scatter` raises them.
    """
    program, source = layout.program, catalog.program
    if program is None:
        return catalog
    config = dict(source.sizes) if source else {}
    known = {name for statement in program.statements if isinstance(statement, Flags) for name in statement.names}
    flags = {name: value for name, value in source.flags.items() if name in known} if source else {}
    sharded = scatter(
        catalog, program, mesh=Mesh({}), sizes=layout.sizes, config=config, flags={**flags, **layout.flags}
    )
    ((_, part),) = sharded.parts
    return replace(part, state=catalog.state)
