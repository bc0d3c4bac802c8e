"""Reading a checkpoint through a conversion program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import read_catalog, read_sharded
from ucp.errors import UsageError
from ucp.lang import Program, load_program
from ucp.lang.ast import Flags
from ucp.mapping.consolidate import consolidate
from ucp.store import Store

ProgramLike = Program | Path | str
"""A program, the path of a ``.ucp`` or ``.json`` file, or the name of a program that comes with ucp."""


def read_source(
    url: str,
    *,
    family: str | None = None,
    program: ProgramLike | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    **options: Any,
) -> tuple[Catalog, Store]:
    """The catalog of the checkpoint at `url`, its tensors put together and named as `program` says, and its store.

    `sizes` and `flags` are the program's, `options` go to the family's reader. Raises what reading raises, and with a
    program what `consolidate` raises; UsageError for sizes or flags without a program.
    """
    if program is None:
        if sizes or flags:
            raise UsageError("sizes and flags are a program's, and none is given", hint="give program=...")
        return read_catalog(url, family=family, **options)
    found = as_program(program)
    sharded, store = read_sharded(url, family=family, **options)
    catalog = consolidate(
        sharded.parts,
        found,
        mesh=sharded.mesh,
        sizes=sizes,
        config=sharded.config,
        flags={**_known(found, sharded.flags), **(flags or {})},
        cuts=sharded.cuts,
        placements=sharded.placements,
    )
    return catalog, store


def _known(program: Program, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Those of a configuration's flags that the program has."""
    declared = {name for one in program.statements if isinstance(one, Flags) for name in one.names}
    return {name: value for name, value in flags.items() if name in declared}


def as_program(program: ProgramLike) -> Program:
    """`program` itself, or what `ucp.lang.load_program` finds under its name or path."""
    return program if isinstance(program, Program) else load_program(program)
