"""What the checks of a program share: its declarations, and how they fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from ucp.lang.ast import Condition, Factor, Flags, Let, MeshAxes, On, Program, Reduce, Sizes
from ucp.lang.error import Kind, nearest, program_error
from ucp.lang.flat import Flat
from ucp.lang.match import captures
from ucp.layout.expr import Arith, Dim, Every, Expr, Name, Operation, Pad, Product, Span


@dataclass(frozen=True)
class Scope:
    """A program under check."""

    program: Program
    flat: Flat

    def fail(
        self, at: Span | None, kind: Kind, cause: str, hint: str | None = None, word: str | None = None
    ) -> NoReturn:
        """Raise the error for what stands at `at`."""
        raise program_error(self.program, at=at, kind=kind, cause=cause, hint=hint, word=word)

    def declared_at(self, name: str) -> Span | None:
        """Where `name` is declared last."""
        found = None
        for statement in self.program.statements:
            if isinstance(statement, MeshAxes | Factor | Sizes | Let | Flags):
                lists = (getattr(statement, what, ()) for what in ("axes", "parts", "names"))
                if name in {*(name for names in lists for name in names), getattr(statement, "name", None)}:
                    found = statement.at
        return found

    def arithmetic(self, value: Arith, *, leaves: frozenset[str] = frozenset()) -> None:
        """Names in arithmetic must be known."""
        if isinstance(value, Operation):
            self.arithmetic(value.left, leaves=leaves)
            self.arithmetic(value.right, leaves=leaves)
        elif isinstance(value, Name):
            known = {*self.flat.all_sizes, *self.flat.all_axes, *leaves, *self.captured}
            if value.name not in known:
                self.fail(value.at, "size", f"`{value.name}` is no size and no axis", nearest(value.name, known))

    @cached_property
    def captured(self) -> set[str]:
        """Names of all captures."""
        patterns = (
            pattern for eq in self.flat.equations for pattern in (eq.source, *(side.name for side in eq.targets))
        )
        return {capture.name for pattern in patterns for capture in captures(pattern)}

    def padding(self, expr: Expr) -> None:
        """Names that padding in `expr` is aligned to must be known."""
        for pad in pads_in(expr):
            if pad.align is not None:
                self.arithmetic(pad.align)

    def conditions(self, conditions: Sequence[Condition]) -> None:
        """Conditions name flags or axes."""
        for condition in conditions:
            if condition.flag not in (*self.flat.flags, *self.flat.all_axes):
                known = (*self.flat.flags, *self.flat.all_axes)
                hint = nearest(condition.flag, known) or f"declare it: `flag {condition.flag}`"
                self.fail(condition.at, "flag", f"`{condition.flag}` is no flag", hint)

    def known_axes(self, axes: Iterable[tuple[str, Span | None]]) -> None:
        """Axes must be those of the mesh."""
        for axis, at in axes:
            if axis not in self.flat.all_axes:
                hint = nearest(axis, self.flat.all_axes) or f"declare it: `mesh {axis}`"
                self.fail(at, "axis", f"`{axis}` is no axis of the mesh", hint, word=axis)

    def reduces(self, reduces: Sequence[Reduce]) -> None:
        """What is done with replicas: along axes that there are, and one thing only."""
        self.known_axes([(axis, reduce.at) for reduce in reduces for axis in reduce.axes])
        for reduce in reduces:
            if reduce.kind != reduces[0].kind:
                cause = f"`{reduces[0].kind}` and `{reduce.kind}` in one rule: which comes first would matter"
                self.fail(reduce.at, "axis", cause)

    def places(self, on: Sequence[On]) -> None:
        """Places are on axes that there are, one on each."""
        self.known_axes([(place.axis, place.at) for place in on])
        for i, place in enumerate(on):
            if any(other.axis == place.axis and other.index != place.index for other in on[:i]):
                self.fail(place.at, "place", f"two places on `{place.axis}`: a tensor cannot be on both alone")


def names_of(value: Arith) -> set[str]:
    """Names in arithmetic."""
    if isinstance(value, Operation):
        return names_of(value.left) | names_of(value.right)
    return {value.name} if isinstance(value, Name) else set()


def pads_in(expr: Expr) -> Iterator[Pad]:
    """All padding in an expression."""
    if isinstance(expr, Pad):
        yield expr
    elif not isinstance(expr, Dim):
        inner = (expr.item,) if isinstance(expr, Every) else expr.items if isinstance(expr, Product) else expr.parts
        for part in inner:
            yield from pads_in(part)


def aligners(expr: Expr) -> set[str]:
    """Names that padding is aligned to."""
    return {name for pad in pads_in(expr) if pad.align is not None for name in names_of(pad.align)}
