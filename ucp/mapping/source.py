"""Reading a checkpoint through a conversion program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import find_converter, read_catalog, read_sharded
from ucp.errors import UsageError
from ucp.lang import Program, from_json, load_program
from ucp.lang.ast import Flags, In, Rule, Statement
from ucp.mapping.consolidate import consolidate
from ucp.store import Store

ProgramLike = Program | Path | str
"""A program, the path of a ``.ucp`` or ``.json`` file, or the name of a program that comes with ucp."""


AUTO = "auto"
"""As a program: the one that the checkpoint itself tells."""


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

    The program `AUTO` is the one that comes with ucp and fits, where the checkpoint tells; else names stay as they are.
    `sizes` and `flags` are the program's, `options` go to the family's reader. Raises what reading raises, and with a
    program what `consolidate` raises; UsageError for sizes or flags without a program.
    """
    if program is None or (program == AUTO and not _may_tell(url, family)):
        return _as_it_is(url, family, sizes=sizes, flags=flags, **options)
    sharded, store = read_sharded(url, family=family, **options)
    if program == AUTO:
        if sharded.program is None:
            return _as_it_is(url, family, sizes=sizes, flags=flags, **options)
        program = sharded.program
    chosen = as_program(program)
    catalog = consolidate(
        sharded.parts,
        chosen,
        mesh=sharded.mesh,
        sizes=sizes,
        config=sharded.config,
        flags={**known_flags(chosen, sharded.flags), **(flags or {})},
        cuts=sharded.cuts,
        placements=sharded.placements,
    )
    return catalog, store


def _may_tell(url: str, family: str | None) -> bool:
    """Whether the checkpoint may tell a program that its reader does not go through by itself."""
    found, _ = find_converter(url, family=family)
    return hasattr(found, "sharded") and not getattr(found, "logical", False)


def _as_it_is(
    url: str,
    family: str | None,
    *,
    sizes: Mapping[str, int] | None,
    flags: Mapping[str, bool] | None,
    **options: Any,
) -> tuple[Catalog, Store]:
    if sizes or flags:
        raise UsageError("sizes and flags are a program's, and none is given", hint="give program=...")
    return read_catalog(url, family=family, **options)


def is_logical(catalog: Catalog) -> bool:
    """Whether the names of `catalog` are logical ones: a program made them, and not one that leaves all names alone."""
    if catalog.program is None:
        return False
    return any(_renames(statement) for statement in from_json(catalog.program.ast).statements)


def _renames(statement: Statement) -> bool:
    if isinstance(statement, In):
        return statement.source != statement.target or any(map(_renames, statement.body))
    return isinstance(statement, Rule) and any(target.name != statement.source.name for target in statement.targets)


def known_flags(program: Program, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Those of a configuration's flags that the program has."""
    declared = {name for one in program.statements if isinstance(one, Flags) for name in one.names}
    return {name: value for name, value in flags.items() if name in declared}


def as_program(program: ProgramLike) -> Program:
    """`program` itself, or what `ucp.lang.load_program` finds under its name or path."""
    return program if isinstance(program, Program) else load_program(program)
