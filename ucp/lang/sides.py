"""One rule: that its two sides say the same, and what follows from it without shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ucp.lang.ast import Reduce, Side
from ucp.lang.error import nearest
from ucp.lang.flat import Equation
from ucp.lang.match import captures, computed, in_part_of_component
from ucp.lang.scope import Scope
from ucp.layout.branches import Branch, branches_in, default_targets
from ucp.layout.dtypes import narrows
from ucp.layout.expr import Dim, Layout
from ucp.layout.invalid import LayoutError


@dataclass(frozen=True, slots=True)
class Ready:
    """One rule with everything that follows from it without shapes.

    `layout` is None where the source has its own geometry and the program names no dims; then `targets` are None too.
    `numbers` are the source captures that stand for numbers. `leaves` are those of them that are dims of some target,
    `axis_leaves` the axes that are. `named[k]` are the dims that the name of target k captures.
    """

    equation: Equation
    layout: Layout | None
    targets: tuple[Layout, ...] | None
    parts: tuple[Branch, ...]
    numbers: frozenset[str]
    leaves: frozenset[str]
    axis_leaves: frozenset[str]
    named: tuple[frozenset[str], ...]
    axes: frozenset[str]
    """Every axis on which the tensor differs by coordinate: cuts, cuts of captures, axes among the dims."""

    @property
    def lossy(self) -> bool:
        """Whether a value may change on the way there and back."""
        return self.equation.lossy or any(reduce.kind != "any" for reduce in self.equation.reduces)

    def inverse(self, axes: Iterable[str]) -> str:
        """``exact``, ``replica-checked``, ``lossy`` or ``one-way``, for a program with these mesh axes."""
        if self.equation.arrow != "<->":
            return "one-way"
        if self.lossy:
            return "lossy"
        return "exact" if set(axes) <= self.axes else "replica-checked"


def ready_rule(scope: Scope, equation: Equation) -> Ready:
    """Check one rule by itself, and give what follows from it. ProgramError with its place."""
    scope.conditions(equation.conditions)
    scope.places(equation.on)
    scope.reduces(equation.reduces)
    _names(scope, equation)
    layout, targets = _layouts(scope, equation)
    for dim in layout.dims if layout is not None else ():
        scope.padding(dim)
    parts = branches_in(layout) if layout is not None else ()
    axes = _axes(scope, equation, parts)
    ready = _leaves(scope, equation, layout, targets, parts, axes)
    _clauses(scope, equation, ready)
    return ready


def _names(scope: Scope, equation: Equation) -> None:
    at_hand = {capture.name for capture in captures(equation.source)}
    for capture in captures(equation.source):
        scope.known_axes([(cut.axis, cut.at) for cut in capture.cuts])
    for pattern in (equation.source, *(side.name for side in equation.targets)):
        for capture in captures(pattern):
            if capture.offset is not None:
                scope.arithmetic(capture.offset)
        for place in computed(pattern):
            scope.arithmetic(place.value, leaves=frozenset(at_hand))
    for side in equation.targets:
        for capture in captures(side.name):
            if capture.cuts:
                scope.fail(capture.at, "name", "cuts stand on the left: a logical name counts over the whole model")


def _layouts(scope: Scope, equation: Equation) -> tuple[Layout | None, tuple[Layout, ...] | None]:
    written = [side.layout for side in equation.targets]
    if equation.layout is None:
        if all(layout is None for layout in written):
            if len(written) > 1:
                scope.fail(equation.at, "dims", "several tensors on the right need a layout on the left")
            return None, None
        if len(written) > 1 or written[0] is None:
            scope.fail(equation.at, "dims", "several tensors on the right need a layout on the left")
        _plain(scope, equation, written[0])
        return replace(written[0], dtype=None), (written[0],)
    parts = _guarded(scope, equation, equation.layout)
    if len(parts) != len(written):
        left, right = _count(len(parts), "part"), _count(len(written), "tensor")
        scope.fail(
            equation.layout.at or equation.at,
            "dims",
            f"{left} on the left, {right} on the right",
            "each part between `+` on the left, padding apart, is one tensor on the right",
        )
    defaults = default_targets(equation.layout)
    targets = tuple(
        replace(default, dtype=None) if layout is None else layout
        for default, layout in zip(defaults, written, strict=True)
    )
    for layout in written:
        if layout is not None:
            _plain(scope, equation, layout)
    return equation.layout, targets


def _guarded(scope: Scope, equation: Equation, layout: Layout) -> tuple[Branch, ...]:
    try:
        return branches_in(layout)
    except LayoutError as error:
        scope.fail(getattr(error.node, "at", None) or equation.at, "dims", error.message, error.hint)


def _plain(scope: Scope, equation: Equation, layout: Layout) -> None:
    """A logical tensor is whole: no cuts, no padding, one part."""
    found = _guarded(scope, equation, layout)
    if len(found) != 1 or any(branch.cuts for branch in found):
        scope.fail(layout.at, "dims", "a logical tensor is whole: no cuts, no padding and no `+` on the right")


def _axes(scope: Scope, equation: Equation, parts: Sequence[Branch]) -> frozenset[str]:
    factors = {factor.axis: factor.parts for factor in scope.flat.factors}
    in_name = [cut for capture in captures(equation.source) for cut in capture.cuts]
    for branch in parts or (None,):
        seen: set[str] = set()
        for cut in (*(branch.cuts if branch else ()), *in_name):
            scope.known_axes([(cut.axis, cut.at)])
            for axis in factors.get(cut.axis, (cut.axis,)):
                if axis in seen:
                    scope.fail(cut.at, "axis", f"axis `{axis}` cuts the tensor twice")
                seen.add(axis)
    whole = {cut.axis for branch in parts for cut in branch.cuts} | {cut.axis for cut in in_name}
    return frozenset(axis for name in whole for axis in factors.get(name, (name,)))


def _leaves(
    scope: Scope,
    equation: Equation,
    layout: Layout | None,
    targets: tuple[Layout, ...] | None,
    parts: tuple[Branch, ...],
    axes: frozenset[str],
) -> Ready:
    source_names = {capture.name for capture in captures(equation.source)}
    cut_names = {capture.name for capture in captures(equation.source) if capture.cuts or capture.offset}
    target_dims = [set(branches_in(target)[0].leaves) for target in targets or ()]
    source_dims = {leaf for branch in parts for leaf in branch.leaves}
    all_axes = set(scope.flat.all_axes)
    axis_leaves = frozenset(
        {leaf for dims in target_dims for leaf in dims if leaf in all_axes}
        | {capture.name for side in equation.targets for capture in captures(side.name) if capture.name in all_axes}
    )
    used_as_dims = frozenset(name for name in source_names if any(name in dims for dims in target_dims))
    named = tuple(
        frozenset(c.name for c in captures(side.name)) & (source_dims | used_as_dims) for side in equation.targets
    )
    for number, branch in enumerate(parts):
        _conserved(scope, equation, number, branch, targets, axis_leaves)
    for number, side in enumerate(equation.targets):
        _spelled(scope, equation, side, source_names, source_dims if parts else set(), axis_leaves, number)
    numbers = cut_names | used_as_dims | (source_names & all_axes)
    numbers |= frozenset[str]().union(
        *(in_part_of_component(name) & source_names for name in (equation.source, *(s.name for s in equation.targets)))
    )
    return Ready(
        equation,
        layout,
        targets,
        parts,
        frozenset(numbers),
        used_as_dims,
        axis_leaves,
        named,
        axes | axis_leaves | (source_names & all_axes),
    )


def _spelled(
    scope: Scope,
    equation: Equation,
    side: Side,
    names: set[str],
    dims: set[str],
    axis_leaves: frozenset[str],
    number: int,
) -> None:
    """Everything that a logical name captures must come from the left."""
    for capture in captures(side.name):
        if capture.name not in names | dims | axis_leaves:
            known = sorted(names | dims | set(scope.flat.all_axes))
            scope.fail(capture.at, "name", f"`{{{capture.name}}}` is only on the right", nearest(capture.name, known))
    there = {capture.name for capture in captures(side.name)}
    if equation.layout is not None:
        there |= {dim.name for dim in _named_dims(side.layout, equation, number)}
    for capture in captures(equation.source):
        if capture.name not in there and capture.name not in scope.flat.all_axes:
            scope.fail(
                capture.at,
                "name",
                f"`{{{capture.name}}}` is only on the left",
                f"name it on the right, as {{{capture.name}}} or as a dim",
            )


def _conserved(
    scope: Scope,
    equation: Equation,
    number: int,
    branch: Branch,
    targets: tuple[Layout, ...] | None,
    axis_leaves: frozenset[str],
) -> None:
    """The dims of a part are those of its tensor."""
    assert targets is not None and equation is not None
    target = targets[number]
    right_dims = [dim for group in branches_in(target)[0].dims for dim in group if dim.name != "1"]
    left_dims = [dim for group in branch.dims for dim in group if dim.name != "1"]
    left_names, right_names = captures(equation.source), captures(equation.targets[number].name)
    _known_dims(scope, (*left_dims, *right_dims))
    left = [dim.name for dim in left_dims] + [c.name for c in left_names]
    right = [dim.name for dim in right_dims] + [c.name for c in right_names]
    for side, dims in (("left", left_dims), ("right", right_dims)):
        names = [dim.name for dim in dims]
        for dim in dims:
            if names.count(dim.name) > 1:
                scope.fail(
                    dim.at,
                    "dims",
                    f"`{dim.name}` stands twice in one part on the {side}: which is which?",
                    f"give one of them a second name: `let {_second(dim.name)} = {dim.name}`",
                )
    for dim in left_dims:
        if dim.name not in right:
            scope.fail(dim.at, "dims", f"`{dim.name}` is only on the left", nearest(dim.name, set(right) - set(left)))
    for dim in right_dims:
        if dim.name not in left and dim.name not in axis_leaves:
            scope.fail(
                dim.at,
                "dims",
                f"`{dim.name}` is only on the right",
                nearest(dim.name, set(left) | set(scope.flat.all_sizes)),
            )
        if dim.name in [c.name for c in right_names]:
            scope.fail(dim.at, "dims", f"`{dim.name}` is a dim and in the name: it can be one of them")


def _known_dims(scope: Scope, dims: Iterable[Dim]) -> None:
    known = {*scope.flat.all_sizes, *scope.flat.all_axes, *scope.captured}
    for dim in dims:
        if dim.literal is None and dim.name not in known:
            hint = nearest(dim.name, known) or f"declare it: `size {dim.name}`"
            scope.fail(dim.at, "size", f"`{dim.name}` is not declared", hint)


def _clauses(scope: Scope, equation: Equation, ready: Ready) -> None:
    for reduce in equation.reduces:
        for axis in reduce.axes:
            if axis in ready.axes:
                scope.fail(
                    reduce.at, "axis", f"axis `{axis}` cuts the tensor: there are no replicas to {_verb(reduce)}"
                )
        if reduce.kind == "sum" and equation.arrow == "<->":
            scope.fail(reduce.at, "inverse", "a sum cannot be undone", "write `->`: import only")
    _narrowing(scope, equation, ready)


def _narrowing(scope: Scope, equation: Equation, ready: Ready) -> None:
    if equation.lossy or ready.layout is None or equation.layout is None or equation.layout.dtype is None:
        return
    for side in equation.targets:
        here, there = equation.layout.dtype, side.layout.dtype if side.layout else None
        if there is None:
            continue
        directions = ((equation.imports, here, there), (equation.exports, there, here))
        for allowed, source, target in directions:
            if allowed and narrows(source, target):
                scope.fail(
                    equation.at,
                    "lossy",
                    f"{source} to {target} loses digits",
                    "say `lossy` at the end of the rule, or use a one-way arrow",
                )


def _named_dims(layout: Layout | None, equation: Equation, number: int) -> list[Dim]:
    assert equation.layout is not None
    chosen = layout or default_targets(equation.layout)[number]
    return [dim for group in branches_in(chosen)[0].dims for dim in group]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _second(name: str) -> str:
    if name.isdecimal():
        return "half" if name == "2" else f"n{name}"
    return f"{name}b" if name[-1].isdecimal() else f"{name}2"


def _verb(reduce: Reduce) -> str:
    return {"any": "choose from", "mean": "average", "sum": "add up"}[reduce.kind]
