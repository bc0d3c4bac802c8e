"""Recorded cuts and placements must be of something that the program cuts: others would be passed over in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ucp.errors import FitError, UsageError
from ucp.lang.check import Checked
from ucp.lang.error import nearest
from ucp.lang.match import captures
from ucp.lang.solve import Cuts
from ucp.layout.expr import Concat, Cut, Dim, Every, Expr, Pad, Product
from ucp.layout.spell import cut_name

Placements = Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]]


def check_recorded(checked: Checked, cuts: Cuts, placements: Placements) -> None:
    """FitError for recorded geometry that no cut of the program has the name and axes of."""
    if not cuts and not placements:
        return
    known = set(_cuts(checked))
    even = {(name, tuple(cut.axis for cut in found if not cut.placed)) for name, found in known}
    placed = {(name, cut.axis) for name, found in known for cut in found if cut.placed}
    for name, axes in cuts:
        if (name, axes) not in even:
            raise _unknown(checked, f"{name}{''.join(f'/{axis}' for axis in axes)}", "cut", even)
    for name, axis in placements:
        if (name, axis) not in placed:
            raise _unknown(checked, f"{name}@{axis}", "placement", {(n, (f"@{a}",)) for n, a in placed})


def check_sizes(checked: Checked, sizes: Iterable[str]) -> None:
    """UsageError for a given size that the program does not have."""
    patterns = (name for eq in checked.flat.equations for name in (eq.source, *(side.name for side in eq.targets)))
    known = {*checked.flat.all_sizes, *(capture.name for pattern in patterns for capture in captures(pattern))}
    for name in sizes:
        if name not in known:
            raise UsageError(f"{checked.program.file}: no size {name!r}", hint=nearest(name, known))


def _unknown(checked: Checked, text: str, what: str, known: set[tuple[str, tuple[str, ...]]]) -> FitError:
    shown = [name + "".join(axis if axis[0] == "@" else f"/{axis}" for axis in axes) for name, axes in known if axes]
    return FitError(
        f"{checked.program.file}: a {what} of `{text}` is recorded, but the program has no such cut",
        hint=nearest(text, shown),
    )


def _cuts(checked: Checked) -> Iterator[tuple[str, tuple[Cut, ...]]]:
    for ready in checked.rules:
        for capture in captures(ready.equation.source):
            yield capture.name, capture.cuts
        for dim in ready.layout.dims if ready.layout is not None else ():
            yield from _in_expr(dim)
    for state in checked.flat.states:
        for dim in state.layout.dims if state.layout is not None else ():
            yield from _in_expr(dim)


def _in_expr(expr: Expr) -> Iterator[tuple[str, tuple[Cut, ...]]]:
    if isinstance(expr, Pad):
        return
    if not isinstance(expr, Every):
        yield cut_name(expr), expr.cuts
    inner: Sequence[Expr] = ()
    if isinstance(expr, Product | Concat):
        inner = expr.items if isinstance(expr, Product) else expr.parts
    for part in inner if not isinstance(expr, Dim) else ():
        yield from _in_expr(part)
