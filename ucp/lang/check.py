"""The checks that a program alone allows, and each rule made ready for binding.

After `check` every name that is used is declared, the two sides of every equation have the same dims, no axis cuts a
tensor twice, no tensor name matches two rules, and every arrow says what can be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ucp.lang.ast import Program
from ucp.lang.flat import Equation, Flat, flatten
from ucp.lang.scope import Scope
from ucp.lang.sides import Ready, ready_rule
from ucp.lang.whole import check_declarations, check_overlaps, check_use

__all__ = ["Checked", "Ready", "check"]


@dataclass(frozen=True, slots=True)
class Checked:
    """A program that is sound by itself."""

    program: Program
    flat: Flat
    rules: tuple[Ready, ...]

    @property
    def defaults(self) -> dict[str, int]:
        """Sizes that have a default."""
        return {name: sizes.default for sizes in self.flat.sizes if sizes.default is not None for name in sizes.names}

    @property
    def axes(self) -> tuple[str, ...]:
        """The finest axes: factored ones are represented by their parts."""
        factored = {factor.axis for factor in self.flat.factors}
        return tuple(axis for axis in self.flat.all_axes if axis not in factored)

    def where(self, equation: Equation) -> str:
        """How messages name a rule."""
        at = f":{equation.at[0]}" if equation.at else ""
        return f"{self.program.file}{at}"


def check(program: Program) -> Checked:
    """Check `program` by itself. ProgramError for the first thing that is wrong, with its place in the text."""
    return _check(_This(program))


@dataclass(frozen=True, slots=True, eq=False)
class _This:
    """A program as a key. Equal programs may come from different texts, whose lines messages tell."""

    program: Program

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _This) and self.program is other.program

    def __hash__(self) -> int:
        return id(self.program)


@lru_cache(maxsize=32)
def _check(key: _This) -> Checked:
    program = key.program
    scope = Scope(program, flatten(program))
    check_declarations(scope)
    rules = tuple(ready_rule(scope, equation) for equation in scope.flat.equations)
    check_use(scope, rules)
    check_overlaps(scope, rules)
    return Checked(program, scope.flat, rules)
