"""Random programs at random meshes: gather undoes scatter, and every seeded defect is refused."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ucp.errors import FitError, ProgramError
from ucp.lang import parse
from ucp.lang.arrays import Array, At, gather, scatter
from ucp.lang.ast import Program
from ucp.lang.check import check
from ucp.layout import Mesh, branches
from ucp.layout.expr import Layout
from ucp.layout.spell import spell
from ucp.testing.equations import Equation, equations

EXTRA = "plain.{n} <-> plain.{n}"


@dataclass(frozen=True)
class Case:
    """A random equation as a program, and tensors to cut by it."""

    equation: Equation
    source: str
    targets: tuple[str, ...]
    logical: dict[str, Array]

    @property
    def axes(self) -> list[str]:
        return [axis for axis, _ in self.equation.setting.mesh.axes]

    def text(self, *, source: str | None = None, targets: tuple[str, ...] | None = None, more: str = "") -> str:
        mesh = f"mesh {' '.join(self.axes)}\n" if self.axes else ""
        used = {dim.name for branch in branches(self.equation.source) for group in branch.dims for dim in group}
        sizes = [name for name in sorted(used | set(self.equation.fixed)) if name in self.equation.setting.sizes]
        declared = f"size {' '.join(sizes)}\n" if sizes else ""
        rule = f"{source or self.source} <-> {', '.join(self.targets if targets is None else targets)}"
        return f"format 1\n{mesh}{declared}{rule}\n{EXTRA}\n{more}"

    def program(self) -> Program:
        return parse(self.text(), file="random.ucp")

    def scatter(self, program: Program | None = None) -> dict[At, dict[str, Array]]:
        setting = self.equation.setting
        return scatter(
            program or self.program(),
            self.logical,
            mesh=setting.mesh,
            sizes=dict(setting.sizes),
            cuts=setting.cuts,
            placements=setting.placements,
        )

    def gather(self, shards: dict[At, dict[str, Array]], program: Program | None = None) -> dict[str, Array]:
        setting = self.equation.setting
        return gather(
            program or self.program(),
            shards,
            mesh=setting.mesh,
            sizes=dict(setting.sizes),
            cuts=setting.cuts,
            placements=setting.placements,
        )


def _case(equation: Equation) -> Case:
    setting = equation.setting
    axes = {axis for axis, _ in setting.mesh.axes}
    in_name = [name for name in equation.fixed if name not in axes]
    source = "s" + "".join(f".{{{name}}}" for name in in_name)
    layout = "[" + ", ".join(spell(dim) for dim in equation.source.dims) + "]"
    targets, logical = [], {"plain.0": np.arange(3, dtype=np.int64)}
    first = 1
    for k, (target, named) in enumerate(zip(equation.targets, equation.captured, strict=True)):
        inside = [dim.name for branch in branches(target) for group in branch.dims for dim in group]
        # What the source's name fixes and no dim of the target takes is in the target's name.
        names = sorted({*named, *(name for name in equation.fixed if name not in inside)})
        name = f"t{k}" + "".join(f".{{{leaf}}}" for leaf in names)
        targets.append(f"{name} [{', '.join(spell(dim) for dim in target.dims)}]")
        shape = _shape(equation, target)
        for index in np.ndindex(*(setting.number(leaf) for leaf in names)):
            size = int(np.prod(shape))
            spelled = f"t{k}" + "".join(f".{value}" for value in index)
            logical[spelled] = np.arange(first, first + size, dtype=np.int64).reshape(shape)
            first += size
    return Case(equation, f"{source} {layout}", tuple(targets), logical)


def _shape(equation: Equation, target: Layout) -> tuple[int, ...]:
    (branch,) = branches(target)
    return tuple(prod(equation.setting.size(dim) for dim in group) for group in branch.dims)


cases = equations().filter(lambda e: len(e.targets) > 0).map(_case)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_gather_undoes_scatter(case: Case) -> None:
    back = case.gather(case.scatter())
    assert back.keys() == case.logical.keys()
    assert all(np.array_equal(back[name], array) for name, array in case.logical.items())


@given(cases, st.data())
@settings(max_examples=60, deadline=None)
def test_a_dropped_part_is_refused(case: Case, data: st.DataObject) -> None:
    assume(len(case.targets) > 1)
    gone = data.draw(st.integers(0, len(case.targets) - 1))
    targets = case.targets[:gone] + case.targets[gone + 1 :]
    with pytest.raises(ProgramError, match=r"error\[dims\].*parts? on the left"):
        check(parse(case.text(targets=targets)))


@given(cases, st.data())
@settings(max_examples=60, deadline=None)
def test_a_misspelt_dim_is_refused(case: Case, data: st.DataObject) -> None:
    known = case.equation.setting.sizes
    names = sorted(name for name in known if f"[{name}" in case.source or f" {name}" in case.source)
    assume(names)
    name = data.draw(st.sampled_from(names))
    head, _, layout = case.source.partition(" ")
    spoiled = layout.replace(name, f"{name}x", 1)
    with pytest.raises(ProgramError, match=r"error\[(dims|size|name)\]"):
        check(parse(case.text(source=f"{head} {spoiled}")))


@given(cases)
@settings(max_examples=60, deadline=None)
def test_an_axis_used_twice_is_refused(case: Case) -> None:
    cut = [axis for axis in case.axes if f"/{axis}" in case.source]
    assume(cut)
    spoiled = case.source.replace(f"/{cut[0]}", f"/{cut[0]}/{cut[0]}", 1)
    with pytest.raises(ProgramError, match=r"error\[axis\].*twice"):
        check(parse(case.text(source=spoiled)))


def _spots(shards: dict[At, dict[str, Array]]) -> list[tuple[At, str]]:
    """Every shard of the random rule."""
    return [(place, name) for place, held in shards.items() for name in held if name != "plain.0"]


@given(cases, st.data())
@settings(max_examples=60, deadline=None)
def test_a_hole_is_refused(case: Case, data: st.DataObject) -> None:
    """Without a shard, either replicas have all that it held or the hole is found."""
    shards = case.scatter()
    spots = [(place, name) for place, name in _spots(shards) if shards[place][name].size]
    assume(spots)
    place, name = data.draw(st.sampled_from(spots))
    lost = shards[place].pop(name)
    try:
        back = case.gather(shards)
    except FitError:
        return
    assert all(np.array_equal(back[key], array) for key, array in case.logical.items()), f"{lost} was lost silently"


@given(cases)
@settings(max_examples=40, deadline=None)
def test_an_ambiguous_match_is_refused(case: Case) -> None:
    name = case.source.split()[0]
    with pytest.raises(ProgramError, match=r"error\[(match|name)\]"):
        check(parse(case.text(more=f"{name} <-> other\n")))


@given(cases)
@settings(max_examples=40, deadline=None)
def test_an_unused_rule_is_refused(case: Case) -> None:
    program = parse(case.text(more="nowhere.weight <-> nowhere\n"))
    with pytest.raises(FitError, match=r"no tensor is named nowhere.weight"):
        case.gather(case.scatter(), program)


@given(cases, st.data())
@settings(max_examples=60, deadline=None)
def test_a_shard_of_another_shape_is_refused(case: Case, data: st.DataObject) -> None:
    """Padding may have any length; a shard that is longer otherwise cannot be."""
    assume("_" not in case.source)
    shards = case.scatter()
    spots = [(place, name) for place, name in _spots(shards) if shards[place][name].ndim]
    assume(spots)
    place, name = data.draw(st.sampled_from(spots))
    dim = data.draw(st.integers(0, shards[place][name].ndim - 1))
    shape = list(shards[place][name].shape)
    shape[dim] += 1
    shards[place][name] = np.zeros(shape, np.int64)
    with pytest.raises(FitError):
        case.gather(shards)


def test_an_uneven_cut_that_nobody_recorded_is_refused() -> None:
    program = parse("format 1\nmesh tp\nsize a\nw [a/tp] <-> w\n")
    with pytest.raises(FitError, match="cannot cut evenly"):
        scatter(program, {"w": np.arange(5)}, mesh=Mesh({"tp": 2}))
