"""The error for equations that make no sense at any mesh."""

from __future__ import annotations

from ucp.errors import ProgramError
from ucp.layout.expr import Arith, Cut, Expr, Layout

Node = Expr | Cut | Layout | Arith


class LayoutError(ProgramError):
    """An ill-formed equation. `node` is what is wrong, so that the caller can say where it stands in the text."""

    def __init__(self, message: str, *, node: Node | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.node = node
