"""What an equation is compiled at: a mesh, the sizes of dims, and the cuts and placements that a source recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ucp.errors import FitError
from ucp.layout.expr import Arith, Cut, Dim, Name, Number, Operation
from ucp.layout.invalid import LayoutError
from ucp.layout.mesh import Mesh

Axes = tuple[str, ...]
_MOST_NUMBERED = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """Mesh, global sizes and recorded geometry. Compared by identity, so that what is compiled for it can be kept.

    `cuts` maps (name of the dim, axes outermost first) to one boundary more than there are pieces, row-major over the
    axes; the name of a composed dim is its text, ``(vocab + _)``. `placements` maps (dim, axis) to the global indices
    that each coordinate of the axis holds, in local order; what several hold are replicas. None of the mappings may
    change afterwards.
    """

    mesh: Mesh
    sizes: Mapping[str, int]
    cuts: Mapping[tuple[str, Axes], tuple[int, ...]] = field(default_factory=dict)
    placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    _axes: dict[str, int] = field(init=False, repr=False)
    _checked: dict[tuple[str, str, int], None] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_axes", dict(self.mesh.axes))

    def size(self, dim: Dim) -> int:
        """Global size of a dim: its number, its size, or the ranks of the axis it is named for."""
        literal = dim.literal
        return self.number(dim.name, dim) if literal is None else literal

    def number(self, name: str, node: Dim | Name | None = None) -> int:
        """Value of a size, or the number of ranks of an axis; LayoutError for an unknown name."""
        found = self.sizes.get(name, self._axes.get(name))
        if found is None:
            raise LayoutError(f"the size of `{name}` is not known", node=node)
        if found < 0:
            raise LayoutError(f"`{name}` has the negative size {found}", node=node)
        return found

    def degree(self, axis: str) -> int:
        """Number of ranks of `axis`; 1 for an axis that the mesh does not name."""
        return self._axes.get(axis, 1)

    def index(self, axis: str, coordinate: Mapping[str, int]) -> int:
        """Index of `coordinate` on `axis`. FitError where it is not known and the axis has more than one rank."""
        degree, index = self.degree(axis), coordinate.get(axis)
        if index is None:
            if degree == 1:
                return 0
            raise FitError(
                f"a tensor is cut over `{axis}` ({degree} ranks), but its index there is not known",
                hint=f"the reader of the source has to tell the `{axis}` index of each tensor",
            )
        if not 0 <= index < degree:
            raise FitError(f"index {index} is not on axis `{axis}`, which has {degree} ranks")
        return index

    def place(self, axis: str, index: int) -> int:
        """Where ``on axis index`` is; negative counts from the last. FitError for more than the axis has."""
        degree = self.degree(axis)
        if not -degree <= index < degree:
            raise FitError(f"`on {axis} {index}`: `{axis}` has {degree} ranks", hint=f"the last one is `on {axis} -1`")
        return index % degree

    def value(self, arith: Arith) -> int:
        """Result of an arithmetic expression; LayoutError for an unknown name or a division with a remainder."""
        match arith:
            case Number(value=value):
                return value
            case Name(name=name):
                return self.number(name, arith)
            case Operation(op=op, left=left, right=right):
                return calculate(op, self.value(left), self.value(right), arith)

    def runs(self, name: str, cuts: Sequence[Cut], length: int, coordinate: Mapping[str, int]) -> list[tuple[int, int]]:
        """Which of the `length` positions of a dim a coordinate holds: (start, count) of each run, in local order.

        FitError where an even cut leaves a remainder, or where a recorded cut or placement does not fit.
        """
        found = [(0, length)]
        for axes, placed in _groups(cuts):
            if placed:
                found = self._placed(name, axes[0], length, coordinate)
            else:
                found = _slice(found, *self._interval(name, axes, _total(found), coordinate))
        return found

    def _interval(self, name: str, axes: Axes, length: int, coordinate: Mapping[str, int]) -> tuple[int, int]:
        pieces = math.prod(self.degree(axis) for axis in axes)
        which = 0
        for axis in axes:
            which = which * self.degree(axis) + self.index(axis, coordinate)
        recorded = self.cuts.get((name, axes))
        if recorded is not None:
            _check_boundaries(recorded, name, axes, length, pieces)
            return recorded[which], recorded[which + 1]
        if length % pieces:
            raise _uneven(name, axes, length, [self.degree(axis) for axis in axes])
        each = length // pieces
        return which * each, (which + 1) * each

    def _placed(self, name: str, axis: str, length: int, coordinate: Mapping[str, int]) -> list[tuple[int, int]]:
        placement = self.placements.get((name, axis))
        if placement is None:
            raise FitError(
                f"`{name}@{axis}`: the source does not say which of `{name}` each `{axis}` rank holds",
                hint=f"give the placement of `{name}` over `{axis}`",
            )
        if (name, axis, length) not in self._checked:
            _check_placement(placement, name, axis, length, self.degree(axis))
            self._checked[name, axis, length] = None
        return _as_runs(placement[self.index(axis, coordinate)])


def check_count(count: int, what: str) -> None:
    """FitError for more tensors than any model has: a size that is wrong, or meant to take for ever."""
    if count > _MOST_NUMBERED:
        raise FitError(
            f"{what}: {count} tensors, more than {_MOST_NUMBERED}", hint="a size or a number in a name is wrong"
        )


def calculate(op: str, left: int, right: int, node: Operation | None = None) -> int:
    """``left op right`` on whole numbers; LayoutError for a division with a remainder or by zero."""
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "min":
            return min(left, right)
        case "max":
            return max(left, right)
    if right == 0 or left % right:
        raise LayoutError(f"{left}/{right} is not a whole number", node=node)
    return left // right


def _groups(cuts: Sequence[Cut]) -> list[tuple[Axes, bool]]:
    """Cuts in a row that count together, outermost first; a placement must come first and counts alone."""
    groups: list[tuple[Axes, bool]] = []
    for number, cut in enumerate(cuts):
        if cut.placed:
            if number:
                raise LayoutError(
                    f"`@{cut.axis}` after another cut: placements count whole dims", node=cut, hint="put it first"
                )
            groups.append(((cut.axis,), True))
        elif groups and not groups[-1][1]:
            groups[-1] = ((*groups[-1][0], cut.axis), False)
        else:
            groups.append(((cut.axis,), False))
    return groups


def _total(runs: Sequence[tuple[int, int]]) -> int:
    return sum(count for _, count in runs)


def _slice(runs: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Positions [start, stop) of what `runs` hold one after the other."""
    found, passed = [], 0
    for first, count in runs:
        a, b = max(start - passed, 0), min(stop - passed, count)
        if a < b:
            found.append((first + a, b - a))
        passed += count
    return found


def _as_runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _check_boundaries(recorded: tuple[int, ...], name: str, axes: Axes, length: int, pieces: int) -> None:
    where = f"recorded cuts of `{name}` over {_list(axes)}, {list(recorded)}"
    if len(recorded) != pieces + 1:
        raise FitError(f"{where}: {pieces} pieces need {pieces + 1} boundaries")
    if recorded[0] != 0 or recorded[-1] != length:
        raise FitError(f"{where}: they must run from 0 to the size, {length}")
    if any(a > b for a, b in pairwise(recorded)):
        raise FitError(f"{where}: they must not fall")


def _check_placement(placement: Mapping[int, tuple[int, ...]], name: str, axis: str, length: int, degree: int) -> None:
    where = f"recorded placement of `{name}` over `{axis}`"
    if set(placement) != set(range(degree)):
        raise FitError(f"{where}: it tells of ranks {sorted(placement)}, but `{axis}` has {degree}")
    held = set[int]()
    for rank, indices in sorted(placement.items()):
        if len(set(indices)) < len(indices):
            raise FitError(f"{where}: rank {rank} holds an index twice")
        for index in indices:
            if not 0 <= index < length:
                raise FitError(f"{where}: rank {rank} holds index {index}, but `{name}` has {length}")
        held.update(indices)
    if len(held) < length:
        raise FitError(f"{where}: no rank holds index {next(n for n in range(length) if n not in held)}")


def _uneven(name: str, axes: Axes, length: int, degrees: Sequence[int]) -> FitError:
    ranks = " x ".join(map(str, degrees))
    return FitError(
        f"`{name}` has size {length}, which {_list(axes)} of {ranks} ranks cannot cut evenly",
        hint=f"use a mesh whose ranks divide {length}, or give the recorded boundaries as `cuts`",
    )


def _list(axes: Axes) -> str:
    return "".join(f"/{axis}" for axis in axes).join("``")
