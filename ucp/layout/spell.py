"""Layout expressions as canonical text: for messages, and as the name of a composed dim in recorded cuts."""

from __future__ import annotations

from ucp.layout.expr import Arith, Concat, Cut, Dim, Every, Expr, Name, Number, Pad, Product


def spell(expr: Expr) -> str:
    """`expr` as it is written in a layout, with the fewest parentheses: ``groups/tp (r d + d + d)``."""
    match expr:
        case Dim(name=name, cuts=cuts):
            return name + _cuts(cuts)
        case Pad(align=align):
            return "_" if align is None else f"_ align {spell_arith(align)}"
        case Every(item=item):
            return f"*{_bracketed(item)}"
        case Product(items=items):
            inner = " ".join(_bracketed(item) for item in items)
        case Concat(parts=parts):
            inner = " + ".join(spell(part) for part in parts)
    return f"({inner}){_cuts(expr.cuts)}" if expr.cuts else inner


def cut_name(expr: Dim | Product | Concat) -> str:
    """What recorded cuts call `expr` without its own cuts: the dim's name, or ``(vocab + _)``."""
    if isinstance(expr, Dim):
        return expr.name
    bare = Product(expr.items) if isinstance(expr, Product) else Concat(expr.parts)
    return f"({spell(bare)})"


def spell_arith(arith: Arith) -> str:
    """Arithmetic as it is written: ``2*dp``."""
    match arith:
        case Number(value=value):
            return str(value)
        case Name(name=name):
            return name
        case _:
            left, right = spell_arith(arith.left), spell_arith(arith.right)
    if arith.op in ("min", "max"):
        return f"{arith.op}({left}, {right})"
    return f"({left} {arith.op} {right})" if arith.op in "+-" else f"{left}{arith.op}{right}"


def _bracketed(item: Expr) -> str:
    text = spell(item)
    return f"({text})" if isinstance(item, Concat | Product) and not item.cuts else text


def _cuts(cuts: tuple[Cut, ...]) -> str:
    return "".join(("@" if cut.placed else "/") + cut.axis for cut in cuts)
