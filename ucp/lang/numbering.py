"""Which of the tensors that a rule makes a coordinate holds, and by which numbers it calls them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import FitError
from ucp.lang.ast import Capture
from ucp.lang.check import Ready
from ucp.lang.match import captures, computed, describe
from ucp.lang.solve import Solver
from ucp.lang.sums import evaluate
from ucp.layout.expr import Dim
from ucp.layout.setting import Setting, check_count

Values = dict[str, int | str]


@dataclass(frozen=True, slots=True)
class Numbering:
    """The tensors of one rule, found by those numbers in their names that are cut over the mesh.

    A coordinate of a large job holds a few of many thousand experts: the others are not looked at.
    """

    cut: tuple[Capture, ...]
    axes: tuple[str, ...]
    """Captures that are axes of the mesh."""
    everywhere: Mapping[str, int]
    """Numbers that the program computes; the same on every coordinate."""
    tensors: Mapping[tuple[int | str, ...], tuple[Values, ...]]
    """Captured values over the whole model, by the values of `cut`."""

    @classmethod
    def of(cls, ready: Ready, tensors: Sequence[Values], solver: Solver) -> Numbering:
        """Index the `tensors` of a rule. FitError for a number in its name that is not known."""
        found = captures(ready.equation.source)
        cut = tuple(capture for capture in found if capture.cuts and capture.name not in solver.mesh)
        by_number: dict[tuple[int | str, ...], list[Values]] = {}
        for values in tensors:
            by_number.setdefault(tuple(values[capture.name] for capture in cut), []).append(values)
        axes = tuple(capture.name for capture in found if capture.name in solver.mesh)
        return cls(cut, axes, _computed(ready, solver), {key: tuple(values) for key, values in by_number.items()})

    def at(self, coordinate: Mapping[str, int], setting: Setting) -> Iterator[tuple[Values, Values]]:
        """Values over the whole model and as names write them at `coordinate`, for each tensor that it holds."""
        here = {**self.everywhere, **{axis: setting.index(axis, coordinate) for axis in self.axes}}
        numbers = [list(_numbers(capture, coordinate, setting)) for capture in self.cut]
        for pairs in itertools.product(*numbers):
            for values in self.tensors.get(tuple([whole for whole, _ in pairs]), ()):
                local = {capture.name: number for capture, (_, number) in zip(self.cut, pairs, strict=True)}
                yield values, {**values, **here, **local}


def _numbers(capture: Capture, coordinate: Mapping[str, int], setting: Setting) -> Iterator[tuple[int, int]]:
    """The numbers that a coordinate holds, over the whole model, and what it calls them."""
    runs = setting.runs(capture.name, capture.cuts, setting.size(Dim(capture.name)), coordinate)
    check_count(sum(count for _, count in runs), capture.name)
    held = itertools.chain.from_iterable(range(start, start + count) for start, count in runs)
    return ((whole, local) for local, whole in enumerate(held))


def _computed(ready: Ready, solver: Solver) -> dict[str, int]:
    found = {}
    for k, place in enumerate(computed(ready.equation.source)):
        value = evaluate(place.value, solver.value)
        if value is None or value.denominator != 1:
            raise FitError(f"{describe(ready.equation.source)}: its number is not known")
        found[f"={k}"] = int(value)
    return found
