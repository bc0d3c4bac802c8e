"""Random equations with one thing broken: each is refused at every coordinate, whatever stands around the defect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ucp.errors import FitError
from ucp.layout import LayoutError, Mesh, Setting, branches, compile_layout
from ucp.layout.branches import target_dims
from ucp.layout.expr import Cut, Dim, Layout, concat, product
from ucp.testing.equations import Equation, equations

mixed = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def refused(equation: Equation, error: type[Exception], match: str) -> None:
    """That no coordinate can compile `equation`."""
    values = dict.fromkeys(equation.fixed, 0)
    for coordinate in equation.setting.mesh.coordinates():
        with pytest.raises(error, match=match):
            compile_layout(
                equation.source,
                equation.targets,
                setting=equation.setting,
                coordinate=coordinate,
                fixed=equation.fixed_at(coordinate, values),
                captured=equation.captured,
            )


def without(items: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    return (*items[:number], *items[number + 1 :])


def of(items: tuple[Any, ...], number: int, item: Any) -> tuple[Any, ...]:
    return (*items[:number], item, *items[number + 1 :])


@mixed
@given(equations(), st.data())
def test_a_dropped_part(equation: Equation, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(equation.targets) - 1))
    broken = replace(equation, targets=without(equation.targets, k), captured=without(equation.captured, k))
    refused(broken, LayoutError, f"{len(equation.targets)} parts on the left, {len(equation.targets) - 1} tensors")


def leaves(target: Layout) -> list[Dim]:
    return [dim for expr in target.dims for dim in target_dims(expr)]


@mixed
@given(equations(), st.data())
def test_a_lost_dim(equation: Equation, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(equation.targets) - 1))
    axes = {axis for axis, _ in equation.setting.mesh.axes}
    dims = [dim for dim in leaves(equation.targets[k]) if dim.name != "1" and dim.name not in axes]
    assume(dims)
    lost = data.draw(st.sampled_from(dims))
    rest = Layout(tuple(dim for dim in leaves(equation.targets[k]) if dim != lost))
    refused(replace(equation, targets=of(equation.targets, k, rest)), LayoutError, f"`{lost.name}` is only on the left")


@mixed
@given(equations(), st.data())
def test_a_typo(equation: Equation, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(equation.targets) - 1))
    dims = [dim for dim in leaves(equation.targets[k]) if dim.name != "1"]
    assume(dims)
    wrong = data.draw(st.sampled_from(dims))
    rest = Layout(tuple(Dim("typo") if dim == wrong else dim for dim in leaves(equation.targets[k])))
    setting = equation.setting
    # Known and of the same size, so that the size alone would not tell.
    sizes = {**setting.sizes, "typo": setting.size(wrong)}
    known = Setting(setting.mesh, sizes, setting.cuts, setting.placements)
    broken = replace(equation, targets=of(equation.targets, k, rest), setting=known)
    refused(broken, LayoutError, "`typo` is only on the right|is only on the left")


@mixed
@given(equations(), st.data())
def test_a_dim_that_stands_twice(equation: Equation, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(equation.targets) - 1))
    dims = [dim for dim in leaves(equation.targets[k]) if dim.name != "1"]
    assume(dims)
    more = Layout((*equation.targets[k].dims, data.draw(st.sampled_from(dims))))
    refused(replace(equation, targets=of(equation.targets, k, more)), LayoutError, "stands twice on the right")


@mixed
@given(equations(), st.data())
def test_an_axis_used_twice(equation: Equation, data: st.DataObject) -> None:
    """Axes of one rank count too: the program is wrong at any mesh."""
    used = [axis for branch in branches(equation.source) for axis in branch.axes]
    assume(used)
    again = Dim("again", (Cut(data.draw(st.sampled_from(used))),))
    setting = equation.setting
    sizes = {**setting.sizes, "again": 12}
    broken = replace(
        equation,
        source=Layout((*equation.source.dims, again)),
        targets=tuple(Layout((*target.dims, Dim("again"))) for target in equation.targets),
        setting=Setting(setting.mesh, sizes, setting.cuts, setting.placements),
    )
    assume(all(12 % degree == 0 for _, degree in setting.mesh.axes))
    refused(broken, LayoutError, "cuts the same tensor twice")


@mixed
@given(st.integers(2, 5), st.integers(1, 30), st.booleans())
def test_a_cut_that_does_not_come_out(degree: int, size: int, composed: bool) -> None:
    assume(size % degree)
    expr = product((concat((Dim("a"), Dim("1"))),), (Cut("tp"),)) if composed else Dim("a", (Cut("tp"),))
    setting = Setting(Mesh({"tp": degree}), {"a": size - 1 if composed else size})
    targets = (Layout((Dim("a"),)), Layout((Dim("1"),)))[: 2 if composed else 1]
    refused(
        Equation(Layout((expr,)), targets, setting, (), (frozenset(),) * len(targets)), FitError, "cannot cut evenly"
    )


@st.composite
def wrong_boundaries(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A size and boundaries for three ranks that leave a hole, overlap, or are too many or too few."""
    size = draw(st.integers(3, 20))
    found = tuple(draw(st.lists(st.integers(0, size + 3), min_size=3, max_size=5)))
    good = len(found) == 4 and found[0] == 0 and found[-1] == size and list(found) == sorted(found)
    assume(not good)
    return size, found


@given(wrong_boundaries())
def test_recorded_boundaries_with_holes_and_overlaps(wrong: tuple[int, tuple[int, ...]]) -> None:
    size, recorded = wrong
    refused(one_cut(size, Cut("tp"), cuts={("a", ("tp",)): recorded}), FitError, "recorded cuts of `a`")


def one_cut(size: int, cut: Cut, **recorded: Any) -> Equation:
    setting = Setting(Mesh({"tp": 3}), {"a": size}, **recorded)
    return Equation(Layout((Dim("a", (cut,)),)), (Layout((Dim("a"),)),), setting, (), (frozenset(),))


@st.composite
def wrong_placements(draw: st.DrawFn) -> tuple[int, Mapping[int, tuple[int, ...]]]:
    """A size, and what three ranks hold of it: something missing, twice on a rank, or not there."""
    size = draw(st.integers(1, 8))
    order = list(draw(st.permutations(range(size))))
    kind = draw(st.sampled_from(["missing", "twice", "outside", "rank"]))
    at = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
    held = {0: order[: at[0]], 1: order[at[0] : at[1]], 2: order[at[1] :]}
    full = draw(st.sampled_from([rank for rank, indices in held.items() if indices]))
    if kind == "missing":
        held[full].pop()
    elif kind == "twice":
        held[full].append(held[full][0])
    elif kind == "outside":
        held[full].append(draw(st.sampled_from([-1, size, size + 5])))
    else:
        held.pop(full) if draw(st.booleans()) else held.update({3: []})
    return size, {rank: tuple(indices) for rank, indices in held.items()}


@given(wrong_placements())
def test_placements_that_lose_or_repeat(wrong: tuple[int, Mapping[int, tuple[int, ...]]]) -> None:
    size, held = wrong
    refused(one_cut(size, Cut("tp", placed=True), placements={("a", "tp"): held}), FitError, "placement of `a`")
