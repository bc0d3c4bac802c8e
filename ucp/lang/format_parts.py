"""The parts of a statement as text: names, layouts, arithmetic, clauses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ucp.lang.ast import Capture, Computed, Condition, On, Pattern, Reduce, Wild
from ucp.lang.parser import KEYWORDS
from ucp.layout.expr import Arith, Concat, Cut, Dim, Every, Expr, Layout, Name, Number, Pad, Product

_PLAIN = re.compile(r"[A-Za-z0-9_.\-{}]+")
_SUM, _TERM, _OPERAND = range(3)
_LEVEL = {"+": _SUM, "-": _SUM, "*": _TERM, "/": _TERM}


def pattern_text(pattern: Pattern) -> str:
    """A name, in quotes where it needs them."""
    plain = [part for part in pattern.parts if isinstance(part, str)]
    if pattern.parts and all(map(_PLAIN.fullmatch, plain)):
        return "".join(_part(part, quoted=False, stars=False) for part in pattern.parts)
    stars = any(isinstance(part, Wild) or (isinstance(part, str) and "**" in part) for part in pattern.parts)
    return '"' + "".join(_part(part, quoted=True, stars=stars) for part in pattern.parts) + '"'


def source_text(pattern: Pattern, *, layout: bool) -> str:
    """The name that begins a rule: in quotes where it would be read as the word of another statement."""
    text = pattern_text(pattern)
    return f'"{text}"' if text in KEYWORDS and not layout else text


def _part(part: str | Capture | Computed | Wild, *, quoted: bool, stars: bool) -> str:
    if isinstance(part, Wild):
        return "**"
    if isinstance(part, Computed):
        return f"{{={arithmetic_text(part.value, tight=True)}}}"
    if isinstance(part, Capture):
        offset = "" if part.offset is None else "+" + arithmetic_text(part.offset, tight=True)
        return f"{{{part.name}{_cuts(part.cuts)}{offset}}}"
    text = part.replace("{", "{{").replace("}", "}}")
    if quoted:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return text.replace("*", "\\*") if stars else text


def layout_text(layout: Layout) -> str:
    """``bf16[a, b]``."""
    return f"{layout.dtype or ''}[{', '.join(map(expr_text, layout.dims))}]"


def expr_text(expr: Expr) -> str:
    """A dim of a layout."""
    if isinstance(expr, Concat) and not expr.cuts:
        return " + ".join(map(_concatenated, expr.parts))
    return _concatenated(expr)


def _concatenated(expr: Expr) -> str:
    """A part of a concatenation."""
    if isinstance(expr, Pad):
        return "_" if expr.align is None else f"_ align {arithmetic_text(expr.align, tight=True, level=_TERM)}"
    if isinstance(expr, Every):
        cut = not isinstance(expr.item, Pad | Every) and expr.item.cuts
        return f"*({expr_text(expr.item)})" if cut else f"*{_atom(expr.item)}"
    if isinstance(expr, Product) and not expr.cuts:
        return " ".join(map(_atom, expr.items))
    return _atom(expr)


def _atom(expr: Expr) -> str:
    if isinstance(expr, Dim):
        return expr.name + _cuts(expr.cuts)
    if isinstance(expr, Product):
        return f"({' '.join(map(_item, expr.items))}){_cuts(expr.cuts)}"
    if isinstance(expr, Concat):
        return f"({' + '.join(map(_concatenated, expr.parts))}){_cuts(expr.cuts)}"
    return f"({expr_text(expr)})"


def _item(expr: Expr) -> str:
    return _concatenated(expr) if isinstance(expr, Every) else _atom(expr)


def _cuts(cuts: tuple[Cut, ...]) -> str:
    return "".join(("@" if cut.placed else "/") + cut.axis for cut in cuts)


def arithmetic_text(value: Arith, *, tight: bool = False, level: int = _SUM) -> str:
    """Arithmetic with as few brackets as it needs; `tight`: without blanks."""
    if isinstance(value, Number):
        return str(value.value)
    if isinstance(value, Name):
        return value.name
    if value.op in ("min", "max"):
        comma = "," if tight else ", "
        inside = comma.join(arithmetic_text(side, tight=tight) for side in (value.left, value.right))
        return f"{value.op}({inside})"
    own = _LEVEL[value.op]
    left = arithmetic_text(value.left, tight=tight, level=own)
    right = arithmetic_text(value.right, tight=tight, level=own + 1)
    text = left + (value.op if tight else f" {value.op} ") + right
    return f"({text})" if own < level else text


def reduces_text(reduces: Iterable[Reduce]) -> str:
    """``any tp mean dp``."""
    return " ".join(f"{reduce.kind} {' '.join(reduce.axes)}" for reduce in reduces)


def clauses_text(
    on: tuple[On, ...], conditions: tuple[Condition, ...], *, optional: bool = False, lossy: bool = False
) -> str:
    """``on pp 0 when tied optional lossy``: in this order."""
    words = [f"on {place.axis} {place.index}" for place in on]
    words += [f"{'when' if condition.wanted else 'unless'} {condition.flag}" for condition in conditions]
    words += ["optional"] * optional + ["lossy"] * lossy
    return " ".join(words)
