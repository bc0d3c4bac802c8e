"""A program tried at a mesh before there is a checkpoint: everything whose sizes are known is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.errors import FitError, UsageError
from ucp.lang.ast import Program
from ucp.lang.check import Checked, Ready, check
from ucp.lang.choose import holds
from ucp.lang.error import nearest
from ucp.lang.match import captures, describe
from ucp.lang.solve import Solver, names_in, solve
from ucp.layout import Mesh
from ucp.layout.branches import axes
from ucp.layout.compile import compile_layout
from ucp.layout.setting import Setting


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of one rule. `coordinates` is how many different shards it makes; 0 where sizes are `lacking`.

    `off` is set where a flag that was given turns the rule off.
    """

    ready: Ready
    coordinates: int
    lacking: tuple[str, ...] = ()
    off: bool = False


def trial(
    program: Program, *, mesh: Mesh, sizes: Mapping[str, int] | None = None, flags: Mapping[str, bool] | None = None
) -> list[Tried]:
    """Check `program` and compile each of its rules for every coordinate of `mesh`, where `sizes` and defaults allow.

    ProgramError for a program that is wrong by itself; UsageError for an axis, size or flag that it does not have;
    FitError where an axis does not divide a dim, or sizes contradict each other.
    """
    checked = check(program)
    _known(checked, mesh, sizes or {}, flags or {})
    solver = solve(checked.flat, [], [], mesh=mesh, sizes=sizes or {}, config={}, cuts={})
    setting = solver.setting({})
    at_hand = {**{axis: mesh[axis] > 1 for axis in checked.flat.all_axes}, **(flags or {})}
    return [_tried(checked, ready, solver, setting, at_hand) for ready in checked.rules]


def _known(checked: Checked, mesh: Mesh, sizes: Mapping[str, int], flags: Mapping[str, bool]) -> None:
    """Everything that is given must be the program's: a typing error would go unnoticed."""
    flat = checked.flat
    numbers = {capture.name for equation in flat.equations for capture in captures(equation.source)}
    for what, given, known in (
        ("axis", dict(mesh.axes), flat.all_axes),
        ("size", sizes, (*flat.all_sizes, *numbers)),
        ("flag", flags, flat.flags),
    ):
        for name in given:
            if name not in known:
                raise UsageError(f"{checked.program.file}: no {what} {name!r}", hint=nearest(name, known))


def _tried(checked: Checked, ready: Ready, solver: Solver, setting: Setting, flags: Mapping[str, bool]) -> Tried:
    conditions = [condition for condition in ready.equation.conditions if condition.flag in flags]
    if not holds(conditions, flags):
        return Tried(ready, 0, off=True)
    lacking = unknown_sizes(ready, solver)
    if lacking or ready.layout is None or ready.targets is None:
        return Tried(ready, 0, tuple(sorted(lacking)))
    fixed = {**dict.fromkeys(ready.leaves, 0), **dict.fromkeys(ready.axis_leaves, 0)}
    count = 0
    for coordinate in coordinates(ready, setting):
        count += 1
        try:
            _numbers(ready, solver, setting, coordinate)
            compile_layout(
                ready.layout, ready.targets, setting=setting, coordinate=coordinate, fixed=fixed, captured=ready.named
            )
        except FitError as error:
            where = f"{checked.where(ready.equation)}: {describe(ready.equation.source)}"
            raise FitError(f"{where}: {error.message}", hint=error.hint) from None
    return Tried(ready, count)


def _numbers(ready: Ready, solver: Solver, setting: Setting, coordinate: Mapping[str, int]) -> None:
    """Numbers in the name must be cut as the mesh asks, where it is known how many there are."""
    for capture in captures(ready.equation.source):
        size = solver.value(capture.name)
        if capture.cuts and size is not None and not any(cut.placed for cut in capture.cuts):
            setting.runs(capture.name, capture.cuts, size, coordinate)


def unknown_sizes(ready: Ready, solver: Solver) -> set[str]:
    """Names in the layouts of a rule whose sizes are not known."""
    layouts = [layout for layout in (ready.layout, *(ready.targets or ())) if layout is not None]
    names = {name for layout in layouts for dim in layout.dims for name in names_in(dim)} | ready.leaves
    return {name for name in names if solver.value(name) is None}


def coordinates(ready: Ready, setting: Setting) -> Iterator[dict[str, int]]:
    """Every coordinate on the axes by which tensors of the rule differ, the last axis fastest."""
    in_name = (cut.axis for capture in captures(ready.equation.source) for cut in capture.cuts)
    cutting = dict.fromkeys((*in_name, *(axes(ready.layout) if ready.layout else ()), *sorted(ready.axis_leaves)))
    for index in itertools.product(*(range(setting.degree(axis)) for axis in cutting)):
        yield dict(zip(cutting, index, strict=True))
