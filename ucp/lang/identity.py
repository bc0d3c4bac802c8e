"""The program of a checkpoint that needs none: every tensor is itself, under its own name."""

from __future__ import annotations

from collections.abc import Iterable

from ucp.errors import ProgramError
from ucp.lang.ast import Pattern, Program, Rule, Side, State
from ucp.lang.check import check
from ucp.lang.draft_names import families


def identity(names: Iterable[str], *, states: bool = True) -> Program:
    """The program that maps each of `names` to itself. Names that differ in numbers only share a rule.

    With `states` optimizer states lie like their parameter.
    """
    known = list(dict.fromkeys(names))
    try:
        program = _program((family.pattern for family in families(known)), states=states)
        check(program)
    except ProgramError:
        # Odd names, in which a number could be read in two ways, have a rule each.
        program = _program((Pattern((name,)) for name in known), states=states)
    return program


def _program(patterns: Iterable[Pattern], *, states: bool) -> Program:
    rules = tuple(Rule(Side(pattern), "<->", (Side(pattern),)) for pattern in patterns)
    return Program((*rules, *([State(("*",))] if states else [])))
