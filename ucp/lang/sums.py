"""Arithmetic over sizes: values, and equations solved for the one name that is not known."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from ucp.errors import FitError
from ucp.layout.expr import Arith, Name, Number

Lookup = Callable[[str], int | None]


def evaluate(value: Arith, lookup: Lookup) -> Fraction | None:
    """The exact value of an expression, None where a name is unknown."""
    if isinstance(value, Number):
        return Fraction(value.value)
    if isinstance(value, Name):
        found = lookup(value.name)
        return None if found is None else Fraction(found)
    left, right = evaluate(value.left, lookup), evaluate(value.right, lookup)
    return None if left is None or right is None else _operate(value.op, left, right)


def invert(value: Arith, target: Fraction, lookup: Lookup) -> tuple[str, Fraction] | None:
    """Solve ``value = target`` for the only unknown name in it: that name and its value, or None.

    None too where the unknown is inside ``min`` or ``max``, or stands twice.
    """
    if isinstance(value, Number):
        return None
    if isinstance(value, Name):
        return value.name, target
    left, right = evaluate(value.left, lookup), evaluate(value.right, lookup)
    if (left is None) == (right is None):
        return None
    try:
        if right is not None:
            rest, undone = value.left, _undo_right(value.op, target, right)
        else:
            assert left is not None
            rest, undone = value.right, _undo_left(value.op, target, left)
    except ZeroDivisionError:
        return None
    return None if undone is None else invert(rest, undone, lookup)


def _undo_right(op: str, target: Fraction, right: Fraction) -> Fraction | None:
    """``x`` of ``x op right = target``."""
    if op in ("+", "-"):
        return target - right if op == "+" else target + right
    if op in ("*", "/"):
        return target / right if op == "*" else target * right
    return None


def _undo_left(op: str, target: Fraction, left: Fraction) -> Fraction | None:
    """``x`` of ``left op x = target``."""
    if op in ("+", "-"):
        return target - left if op == "+" else left - target
    if op in ("*", "/"):
        return target / left if op == "*" else left / target
    return None


def _operate(op: str, left: Fraction, right: Fraction) -> Fraction:
    if op == "/":
        if not right:
            raise FitError("a program divides by zero")
        return left / right
    if op in ("min", "max"):
        return min(left, right) if op == "min" else max(left, right)
    return left + right if op == "+" else left - right if op == "-" else left * right
