"""A program without its blocks: every rule with whole names, and the conditions and places of the blocks around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ucp.lang.ast import (
    Arrow,
    Capture,
    Computed,
    Condition,
    Drop,
    Factor,
    Flags,
    In,
    Let,
    MeshAxes,
    On,
    Pack,
    Pattern,
    Program,
    Reduce,
    Rule,
    Side,
    Sizes,
    State,
    Statement,
    Tie,
    Wild,
)
from ucp.layout.expr import Layout, Span

_Kind = TypeVar("_Kind")
_NO_NAME = Pattern(())


@dataclass(frozen=True, slots=True)
class Equation:
    """One rule in full. `number` is its place in the program, which names it in caches and reports."""

    number: int
    source: Pattern
    layout: Layout | None
    arrow: Arrow
    targets: tuple[Side, ...]
    reduces: tuple[Reduce, ...]
    on: tuple[On, ...]
    conditions: tuple[Condition, ...]
    optional: bool
    lossy: bool
    at: Span | None = field(compare=False)
    choice: tuple[int, ...] | None = None
    """Where the rule is optional for the sake of a block around it: that block. Its rules find something together."""

    @property
    def imports(self) -> bool:
        """Whether the equation is read from left to right."""
        return self.arrow != "<-"

    @property
    def exports(self) -> bool:
        """Whether the equation is read from right to left."""
        return self.arrow != "->"


@dataclass(frozen=True, slots=True)
class Flat:
    """A program by kind of statement, blocks resolved."""

    program: Program
    equations: tuple[Equation, ...] = ()
    drops: tuple[Pattern, ...] = ()
    axes: tuple[str, ...] = ()
    factors: tuple[Factor, ...] = ()
    sizes: tuple[Sizes, ...] = ()
    lets: tuple[Let, ...] = ()
    flags: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    ties: tuple[Tie, ...] = ()
    packs: tuple[Pack, ...] = ()

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Axes of the mesh and the finer ones they are factored into."""
        return (*self.axes, *(part for factor in self.factors for part in factor.parts))

    @property
    def all_sizes(self) -> tuple[str, ...]:
        """Declared sizes and lets."""
        return (*(name for sizes in self.sizes for name in sizes.names), *(let.name for let in self.lets))


@dataclass(frozen=True, slots=True)
class _Around:
    """What the blocks around a statement add to it."""

    source: Pattern = _NO_NAME
    target: Pattern = _NO_NAME
    on: tuple[On, ...] = ()
    conditions: tuple[Condition, ...] = ()
    optional: bool = False
    path: tuple[int, ...] = ()
    choice: tuple[int, ...] | None = None

    def inside(self, block: In, number: int) -> _Around:
        path = (*self.path, number)
        return _Around(
            join(self.source, block.source),
            join(self.target, block.target),
            (*self.on, *block.on),
            (*self.conditions, *block.conditions),
            self.optional or block.optional,
            path,
            path if block.optional else self.choice,
        )


def join(prefix: Pattern, name: Pattern) -> Pattern:
    """`prefix` and `name` with a dot between, either of which may be empty."""
    if not prefix.parts or not name.parts:
        return replace(prefix, at=name.at) if prefix.parts else name
    merged: list[str | Capture | Computed | Wild] = []
    for part in (*prefix.parts, ".", *name.parts):
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return Pattern(tuple(merged), name.at)


def flatten(program: Program) -> Flat:
    """Resolve blocks. Nothing is checked."""
    equations: list[Equation] = []
    drops: list[Pattern] = []
    rest: list[Statement] = []
    for statement, around in _walk(program.statements, _Around()):
        if isinstance(statement, Rule):
            equations.append(_equation(len(equations), statement, around))
        elif isinstance(statement, Drop):
            drops.extend(join(around.source, name) for name in statement.names)
        else:
            rest.append(statement)
    return Flat(
        program,
        tuple(equations),
        tuple(drops),
        tuple(axis for mesh in _all(MeshAxes, rest) for axis in mesh.axes),
        _all(Factor, rest),
        _all(Sizes, rest),
        _all(Let, rest),
        tuple(name for flags in _all(Flags, rest) for name in flags.names),
        _all(State, rest),
        _all(Tie, rest),
        _all(Pack, rest),
    )


def exclusive(first: Sequence[Condition], second: Sequence[Condition]) -> bool:
    """Whether two lists of conditions can never hold together."""
    wanted = {condition.flag: condition.wanted for condition in first}
    return any(wanted.get(condition.flag, condition.wanted) != condition.wanted for condition in second)


def _all(kind: type[_Kind], statements: list[Statement]) -> tuple[_Kind, ...]:
    return tuple(statement for statement in statements if isinstance(statement, kind))


def _walk(statements: tuple[Statement, ...], around: _Around) -> Iterator[tuple[Statement, _Around]]:
    for number, statement in enumerate(statements):
        if isinstance(statement, In):
            yield from _walk(statement.body, around.inside(statement, number))
        else:
            yield statement, around


def _equation(number: int, rule: Rule, around: _Around) -> Equation:
    return Equation(
        number,
        join(around.source, rule.source.name),
        rule.source.layout,
        rule.arrow,
        tuple(Side(join(around.target, side.name), side.layout) for side in rule.targets),
        rule.reduces,
        (*around.on, *rule.on),
        (*around.conditions, *rule.conditions),
        rule.optional or around.optional,
        rule.lossy,
        rule.at,
        None if rule.optional else around.choice,
    )
