"""Layouts and arithmetic: everything between brackets, and what stands after ``=``."""

from __future__ import annotations

import re
from typing import Literal

from ucp.lang.error import nearest
from ucp.lang.scan import DEEPEST, DIGITS, DTYPES, MOST_OPERATIONS, Mark, Scanner
from ucp.layout.expr import Arith, Cut, Dim, Every, Expr, Layout, Name, Number, Operation, Pad, concat, product

_DTYPE = re.compile(rf"(?:{'|'.join(DTYPES)})(?=\[)")
_BRACKETED = re.compile(r"[A-Za-z0-9_]+(?=\[)")
_ATOM = re.compile(r"[A-Za-z0-9(]")
_CALL = re.compile(r"(?:min|max)(?![A-Za-z0-9_])")
_ALIGN = re.compile(r"align(?![A-Za-z0-9_])")
_WORD = re.compile(r"[A-Za-z0-9_]+")
_CUT = re.compile(r"[/@]")
_PLUS = re.compile(r"[+\-]")
_TIMES = re.compile(r"[*/]")


class LayoutParser:
    """Parses expressions at a scanner, each with the space after it.

    `every` allows ``*x``, for a `pack`. `tight` allows no space at all, for what stands in a name.
    """

    __slots__ = ("_depth", "_every", "_operations", "_scanner", "_tight")

    def __init__(self, scanner: Scanner, *, every: bool = False, tight: bool = False) -> None:
        self._scanner = scanner
        self._every = every
        self._tight = tight
        self._depth = 0
        self._operations = 0

    def layout(self) -> Layout | None:
        """The layout that stands here; None if there is none."""
        scanner = self._scanner
        begin = scanner.mark()
        dtype = scanner.match(_DTYPE)
        unknown = scanner.match(_BRACKETED)
        if unknown is not None:
            raise scanner.error(
                f"`{unknown}` is no element type", at=scanner.since(begin), kind="dtype", hint=nearest(unknown, DTYPES)
            )
        if not scanner.sees("["):
            return None
        dims = self.dims()
        return Layout(dims, dtype, scanner.since(begin))

    def dims(self) -> tuple[Expr, ...]:
        """``[dim, dim, …]``."""
        scanner = self._scanner
        begin = self._open()
        found: list[Expr] = []
        if not scanner.sees("]"):
            found.append(self.expression())
            while self._sign(","):
                found.append(self.expression())
        self._close("]", begin)
        return tuple(found)

    def expression(self) -> Expr:
        """A dim of a layout: a term, or several parts joined with ``+``."""
        begin = self._scanner.mark()
        parts = [self._part()]
        while self._sign("+"):
            parts.append(self._part())
        at = self._scanner.since(begin)
        if len(parts) == 1 and isinstance(parts[0], Pad):
            raise self._scanner.error("`_` is a part of a concatenation, as in `(vocab + _)`", at=at)
        return concat(tuple(parts), (), at) if len(parts) > 1 else parts[0]

    def _part(self) -> Expr:
        scanner = self._scanner
        begin = scanner.mark()
        if scanner.sees("_"):
            return self._pad()
        if self._sign("*"):
            if not self._every:
                raise scanner.error("`*` is for `pack` only, and in no other `*`", at=scanner.since(begin))
            self._every = False
            item = self._atom()
            self._every = True
            return Every(item, scanner.since(begin))
        items = [self._atom()]
        while scanner.looks(_ATOM):
            items.append(self._atom())
        if scanner.sees("_"):
            raise scanner.error("`_` is a part by itself", at=scanner.here(), hint="write `+ _`")
        return product(tuple(items), (), scanner.since(begin))

    def _pad(self) -> Pad:
        scanner = self._scanner
        begin = scanner.mark()
        scanner.take("_")
        if scanner.match(_WORD):
            raise scanner.error("a name begins with a letter", at=scanner.since(begin))
        self._gap()
        if not scanner.match(_ALIGN):
            return Pad(None, scanner.since(begin))
        self._gap()
        self._operations = 0
        align = self._multiplication()
        if scanner.looks(_ATOM):
            raise scanner.expected("`+` or `)`", hint="what padding is aligned to is arithmetic: a product has a `*`")
        return Pad(align, scanner.since(begin))

    def _atom(self) -> Expr:
        """A name, a number or brackets, with its cuts."""
        scanner = self._scanner
        begin = scanner.mark()
        if scanner.sees("("):
            opened = self._open()
            inside = self.expression()
            self._close(")", opened)
            cuts = self._cuts()
            return product((inside,), cuts, scanner.since(begin)) if cuts else inside
        if not scanner.looks(_ATOM):
            raise scanner.expected("a dim")
        if scanner.looks(DIGITS):
            name = str(scanner.number("a dim that is a number", least=1))
        else:
            name = scanner.identifier("a dim")
        self._gap()
        return Dim(name, self._cuts(), scanner.since(begin))

    def _cuts(self) -> tuple[Cut, ...]:
        """``/axis`` and ``@axis``, any number of them."""
        found = []
        while self._scanner.looks(_CUT):
            begin = self._scanner.mark()
            placed = self._scanner.sees("@")
            self._sign("@" if placed else "/")
            axis = self._scanner.identifier("a mesh axis")
            self._gap()
            found.append(Cut(axis, placed, self._scanner.since(begin)))
        return tuple(found)

    def arithmetic(self) -> Arith:
        """``+`` and ``-`` of what `_multiplication` reads, from left to right."""
        if not self._depth:
            self._operations = 0
        begin = self._scanner.mark()
        left = self._multiplication()
        while self._scanner.looks(_PLUS):
            op: Literal["+", "-"] = "+" if self._scanner.sees("+") else "-"
            self._operation(op)
            left = Operation(op, left, self._multiplication(), self._scanner.since(begin))
        return left

    def _multiplication(self) -> Arith:
        begin = self._scanner.mark()
        left = self._operand()
        while self._scanner.looks(_TIMES):
            op: Literal["*", "/"] = "*" if self._scanner.sees("*") else "/"
            self._operation(op)
            left = Operation(op, left, self._operand(), self._scanner.since(begin))
        return left

    def _operand(self) -> Arith:
        scanner = self._scanner
        begin = scanner.mark()
        if scanner.sees("("):
            opened = self._open()
            value = self.arithmetic()
            self._close(")", opened)
            return value
        if scanner.looks(_CALL):
            return self._call()
        if scanner.looks(DIGITS):
            number = scanner.number("a number")
            self._gap()
            return Number(number, scanner.since(begin))
        name = scanner.identifier("a number, a size or a mesh axis")
        self._gap()
        return Name(name, scanner.since(begin))

    def _call(self) -> Operation:
        """``min(a, b)`` or ``max(a, b)``."""
        scanner = self._scanner
        begin = scanner.mark()
        op: Literal["min", "max"] = "min" if scanner.sees("min") else "max"
        self._operation(op)
        if not scanner.sees("("):
            raise scanner.expected(f"`(` after `{op}`", hint=f"`{op}(a, b)`")
        opened = self._open()
        left = self.arithmetic()
        if not self._sign(","):
            raise scanner.expected("`,`", hint=f"`{op}(a, b)` has two operands")
        right = self.arithmetic()
        self._close(")", opened)
        return Operation(op, left, right, scanner.since(begin))

    def _operation(self, op: str) -> None:
        begin = self._scanner.mark()
        self._scanner.take(op)
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            cause = f"more than {MOST_OPERATIONS} operations in one expression"
            raise self._scanner.error(cause, at=self._scanner.since(begin), kind="limit", hint="use `let` for parts")
        self._gap()

    def _sign(self, sign: str) -> bool:
        """Step over `sign` and the space after it, if it stands here."""
        if not self._scanner.take(sign):
            return False
        self._gap()
        return True

    def _open(self) -> Mark:
        """Step over an opening bracket."""
        begin = self._scanner.mark()
        self._scanner.at += 1
        self._depth += 1
        if self._depth > DEEPEST:
            cause = f"more than {DEEPEST} brackets in each other"
            raise self._scanner.error(cause, at=self._scanner.since(begin), kind="limit")
        self._gap()
        return begin

    def _close(self, bracket: str, opened: Mark) -> None:
        """Step over the closing `bracket` of what was `opened`."""
        scanner = self._scanner
        if not scanner.take(bracket):
            line = opened[0]
            hint = f"it was opened on line {line}" if scanner.mark()[0] != line else None
            raise scanner.expected(f"`{bracket}`", hint=hint)
        self._depth -= 1
        self._gap()

    def _gap(self) -> None:
        """Step over what may stand between two tokens: outside brackets a statement ends with its line."""
        if self._tight:
            return
        if self._depth:
            self._scanner.space()
        else:
            self._scanner.blanks()
