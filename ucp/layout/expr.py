"""Layout expressions: how one tensor lies on the mesh, as an expression per dim.

Five marks: a named dim; juxtaposition composes dims, outer to inner; ``+`` concatenates; ``x/axis`` cuts; ``_`` pads.
The language parses to these nodes and `ucp.layout.compile` turns them into blocks. `at` says where in a program's
text a node stands; it takes no part in comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal as OneOf

Span = tuple[int, int, int]
"""Line, first column and one past the last column, all 1-based, of a piece of program text on one line."""


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number in arithmetic."""

    value: int
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Name:
    """A size, a `let` or a mesh axis (its number of ranks) in arithmetic."""

    name: str
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Operation:
    """``left op right``; division must leave no remainder. ``min`` and ``max`` are written as calls."""

    op: OneOf["+", "-", "*", "/", "min", "max"]
    left: Arith
    right: Arith
    at: Span | None = field(default=None, compare=False, repr=False)


Arith = Number | Name | Operation


@dataclass(frozen=True, slots=True)
class Cut:
    """``/axis``: contiguous pieces in rank order. ``@axis``: `placed`, any indices as the source records per rank."""

    axis: str
    placed: bool = False
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dim, or a whole number that stands for itself (its name is its decimal form). Cuts go outermost first."""

    name: str
    cuts: tuple[Cut, ...] = ()
    at: Span | None = field(default=None, compare=False, repr=False)

    @property
    def literal(self) -> int | None:
        """The size, where the dim is a number."""
        return int(self.name) if self.name.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Pad:
    """``_``: padding, a part of a concatenation. With `align` the whole concatenation is a multiple of it."""

    align: Arith | None = None
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Product:
    """``a b``: composed dims, outer to inner. Has two items or more, or one and cuts."""

    items: tuple[Expr, ...]
    cuts: tuple[Cut, ...] = ()
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Concat:
    """``a + b``: one part after the other. Has two parts or more."""

    parts: tuple[Expr, ...]
    cuts: tuple[Cut, ...] = ()
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Every:
    """``*item``, only in a pack: `item` once for each parameter of the pack, one after the other.

    Inside it the dim ``param`` stands for all elements of a parameter.
    """

    item: Expr
    at: Span | None = field(default=None, compare=False, repr=False)


Expr = Dim | Pad | Product | Concat | Every


@dataclass(frozen=True, slots=True)
class Layout:
    """``dtype[dim, dim, …]``; `dtype` is None where the program says nothing. A scalar has no dims."""

    dims: tuple[Expr, ...]
    dtype: str | None = None
    at: Span | None = field(default=None, compare=False, repr=False)


def product(items: tuple[Expr, ...], cuts: tuple[Cut, ...] = (), at: Span | None = None) -> Expr:
    """The canonical form of composed dims: products without cuts are flattened, one item alone is itself."""
    flat: list[Expr] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Product) and not item.cuts else (item,))
    return flat[0] if len(flat) == 1 and not cuts else _with_cuts(flat, cuts, at)


def _with_cuts(items: list[Expr], cuts: tuple[Cut, ...], at: Span | None) -> Expr:
    if len(items) == 1:
        only = items[0]
        if isinstance(only, Dim) and not only.cuts:
            return Dim(only.name, cuts, at)
        if isinstance(only, Concat) and not only.cuts:
            return Concat(only.parts, cuts, at)
    return Product(tuple(items), cuts, at)


def concat(parts: tuple[Expr, ...], cuts: tuple[Cut, ...] = (), at: Span | None = None) -> Expr:
    """The canonical form of a concatenation: concatenations without cuts are flattened, one part alone is itself."""
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Concat) and not part.cuts else (part,))
    return product((flat[0],), cuts, at) if len(flat) == 1 else Concat(tuple(flat), cuts, at)
