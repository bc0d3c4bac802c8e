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
    if right is not None:
        undo = {
            "+": lambda: target - right,
            "-": lambda: target + right,
            "*": lambda: target / right,
            "/": lambda: target * right,
        }
        rest = value.left
    else:
        assert left is not None
        known = left
        undo = {
            "+": lambda: target - known,
            "-": lambda: known - target,
            "*": lambda: target / known,
            "/": lambda: known / target,
        }
        rest = value.right
    if value.op not in undo:
        return None
    try:
        return invert(rest, undo[value.op](), lookup)
    except ZeroDivisionError:
        return None


def _operate(op: str, left: Fraction, right: Fraction) -> Fraction:
    if op == "/":
        if not right:
            raise FitError("a program divides by zero")
        return left / right
    if op in ("min", "max"):
        return min(left, right) if op == "min" else max(left, right)
    return left + right if op == "+" else left - right if op == "-" else left * right
