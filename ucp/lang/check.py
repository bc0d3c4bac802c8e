"""The checks that a program alone allows, and each rule made ready for binding.

After `check` every name that is used is declared, the two sides of every equation have the same dims, no axis cuts a
tensor twice, no tensor name matches two rules, and every arrow says what can be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

from ucp.errors import ProgramError
from ucp.lang.ast import (
    Capture,
    Condition,
    Factor,
    Flags,
    Let,
    MeshAxes,
    On,
    Pattern,
    Program,
    Reduce,
    Side,
    Sizes,
)
from ucp.lang.error import Kind, nearest, program_error
from ucp.lang.flat import Equation, Flat, flatten
from ucp.lang.match import Matcher, captures, computed, in_part_of_component
from ucp.lang.overlap import both_match
from ucp.lang.solve import names_in
from ucp.layout.branches import Branch, branches_in, default_targets
from ucp.layout.dtypes import narrows
from ucp.layout.expr import Arith, Dim, Every, Expr, Layout, Name, Operation, Pad, Product, Span
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


@dataclass(frozen=True, slots=True)
class Checked:
    """A program that is sound by itself."""

    program: Program
    flat: Flat
    rules: tuple[Ready, ...]

    @property
    def defaults(self) -> dict[str, int]:
        """Sizes that have a default."""
        return {name: sizes.default for sizes in self.flat.sizes if sizes.default is not None for name in sizes.names}

    @property
    def axes(self) -> tuple[str, ...]:
        """The finest axes: factored ones are represented by their parts."""
        factored = {factor.axis for factor in self.flat.factors}
        return tuple(axis for axis in self.flat.all_axes if axis not in factored)

    def where(self, equation: Equation) -> str:
        """How messages name a rule."""
        at = f":{equation.at[0]}" if equation.at else ""
        return f"{self.program.file}{at}"


@lru_cache(maxsize=32)
def check(program: Program) -> Checked:
    """Check `program` by itself. ProgramError for the first thing that is wrong, with its place in the text."""
    flat = flatten(program)
    checker = _Checker(program, flat)
    checker.declarations()
    rules = tuple(checker.rule(equation) for equation in flat.equations)
    checker.unused(rules)
    checker.ambiguous(rules)
    return Checked(program, flat, rules)


@dataclass(frozen=True, slots=True)
class _Checker:
    program: Program
    flat: Flat

    def fail(
        self, at: Span | None, kind: Kind, cause: str, hint: str | None = None, word: str | None = None
    ) -> NoReturn:
        raise program_error(self.program, at=at, kind=kind, cause=cause, hint=hint, word=word)

    # Declarations

    def declarations(self) -> None:
        flat = self.flat
        seen: dict[str, str] = {}
        declared = [(name, "axis") for name in flat.all_axes if name not in flat.all_sizes]
        declared += [(name, "size") for name in flat.all_sizes] + [(name, "flag") for name in flat.flags]
        for name, kind in declared:
            if name in seen:
                both = "" if seen[name] == kind else f", as {seen[name]} and {kind}"
                self.fail(self._declared_at(name), "name", f"`{name}` is declared twice{both}", word=name)
            seen[name] = kind
        for axis in flat.axes:
            if flat.axes.count(axis) > 1:
                self.fail(self._declared_at(axis), "axis", f"axis `{axis}` is declared twice", word=axis)
        for factor in flat.factors:
            if factor.axis not in flat.axes:
                self.fail(factor.at, "axis", f"`{factor.axis}` is no axis of the mesh", nearest(factor.axis, flat.axes))
        for let in flat.lets:
            self.arithmetic(let.value)
        self.states()
        for tie in flat.ties:
            self.conditions(tie.conditions)
            for name in (tie.alias, tie.name):
                if captures(name):
                    self.fail(name.at, "tie", "a tie names tensors, without captures")

    def _declared_at(self, name: str) -> Span | None:
        """Where `name` is declared last."""
        found = None
        for statement in self.program.statements:
            if isinstance(statement, MeshAxes | Factor | Sizes | Let | Flags):
                lists = (getattr(statement, what, ()) for what in ("axes", "parts", "names"))
                if name in {*(name for names in lists for name in names), getattr(statement, "name", None)}:
                    found = statement.at
        return found

    def states(self) -> None:
        seen: set[str] = set()
        for state in self.flat.states:
            for name in state.names:
                if name in seen or name == "value":
                    cause = "`value` is always there" if name == "value" else f"state `{name}` is described twice"
                    self.fail(state.at, "state", cause, word=name)
                seen.add(name)
            self.known_axes([(axis, state.at) for axis in state.each])
            self.reduces(state.reduces)
            if state.layout is not None and branches_in(state.layout) and len(branches_in(state.layout)) > 1:
                self.fail(state.at, "state", "a state's own layout has one part")

    def arithmetic(self, value: Arith, *, leaves: frozenset[str] = frozenset()) -> None:
        if isinstance(value, Operation):
            self.arithmetic(value.left, leaves=leaves)
            self.arithmetic(value.right, leaves=leaves)
        elif isinstance(value, Name):
            known = {*self.flat.all_sizes, *self.flat.all_axes, *leaves, *self._captured()}
            if value.name not in known:
                self.fail(value.at, "size", f"`{value.name}` is no size and no axis", nearest(value.name, known))

    def _captured(self) -> set[str]:
        patterns = (
            pattern for eq in self.flat.equations for pattern in (eq.source, *(side.name for side in eq.targets))
        )
        return {capture.name for pattern in patterns for capture in captures(pattern)}

    def conditions(self, conditions: Sequence[Condition]) -> None:
        for condition in conditions:
            if condition.flag not in (*self.flat.flags, *self.flat.all_axes):
                known = (*self.flat.flags, *self.flat.all_axes)
                hint = nearest(condition.flag, known) or f"declare it: `flag {condition.flag}`"
                self.fail(condition.at, "flag", f"`{condition.flag}` is no flag", hint)

    def known_axes(self, axes: Iterable[tuple[str, Span | None]]) -> None:
        for axis, at in axes:
            if axis not in self.flat.all_axes:
                hint = nearest(axis, self.flat.all_axes) or f"declare it: `mesh {axis}`"
                self.fail(at, "axis", f"`{axis}` is no axis of the mesh", hint, word=axis)

    def reduces(self, reduces: Sequence[Reduce]) -> None:
        self.known_axes([(axis, reduce.at) for reduce in reduces for axis in reduce.axes])

    def places(self, on: Sequence[On]) -> None:
        self.known_axes([(place.axis, place.at) for place in on])
        for i, place in enumerate(on):
            if any(other.axis == place.axis and other.index != place.index for other in on[:i]):
                self.fail(place.at, "place", f"two places on `{place.axis}`: a tensor cannot be on both alone")

    # Rules

    def rule(self, equation: Equation) -> Ready:
        self.conditions(equation.conditions)
        self.places(equation.on)
        self.reduces(equation.reduces)
        self.names(equation)
        layout, targets = self.layouts(equation)
        parts = branches_in(layout) if layout is not None else ()
        axes = self.axes(equation, layout, parts)
        ready = self.leaves(equation, layout, targets, parts, axes)
        self.clauses(equation, ready)
        return ready

    def names(self, equation: Equation) -> None:
        at_hand = {capture.name for capture in captures(equation.source)}
        for capture in captures(equation.source):
            self.known_axes([(cut.axis, cut.at) for cut in capture.cuts])
        for pattern in (equation.source, *(side.name for side in equation.targets)):
            for capture in captures(pattern):
                if capture.offset is not None:
                    self.arithmetic(capture.offset)
            for place in computed(pattern):
                self.arithmetic(place.value, leaves=frozenset(at_hand))
        for side in equation.targets:
            for capture in captures(side.name):
                if capture.cuts:
                    self.fail(capture.at, "name", "cuts stand on the left: a logical name counts over the whole model")

    def layouts(self, equation: Equation) -> tuple[Layout | None, tuple[Layout, ...] | None]:
        written = [side.layout for side in equation.targets]
        if equation.layout is None:
            if all(layout is None for layout in written):
                if len(written) > 1:
                    self.fail(equation.at, "dims", "several tensors on the right need a layout on the left")
                return None, None
            if len(written) > 1 or written[0] is None:
                self.fail(equation.at, "dims", "several tensors on the right need a layout on the left")
            self.plain(written[0])
            return replace(written[0], dtype=None), (written[0],)
        parts = self.guarded(equation, equation.layout)
        if len(parts) != len(written):
            left, right = _count(len(parts), "part"), _count(len(written), "tensor")
            self.fail(
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
                self.plain(layout)
        return equation.layout, targets

    def guarded(self, equation: Equation, layout: Layout) -> tuple[Branch, ...]:
        try:
            return branches_in(layout)
        except LayoutError as error:
            self.fail(getattr(error.node, "at", None) or equation.at, "dims", error.message, error.hint)

    def plain(self, layout: Layout) -> None:
        """A logical tensor is whole: no cuts, no padding, one part."""
        if len(branches_in(layout)) != 1 or any(branch.cuts for branch in branches_in(layout)):
            self.fail(layout.at, "dims", "a logical tensor is whole: no cuts, no padding and no `+` on the right")

    def axes(self, equation: Equation, layout: Layout | None, parts: Sequence[Branch]) -> frozenset[str]:
        factors = {factor.axis: factor.parts for factor in self.flat.factors}
        in_name = [cut for capture in captures(equation.source) for cut in capture.cuts]
        for branch in parts or (None,):
            seen: set[str] = set()
            for cut in (*(branch.cuts if branch else ()), *in_name):
                self.known_axes([(cut.axis, cut.at)])
                for axis in factors.get(cut.axis, (cut.axis,)):
                    if axis in seen:
                        self.fail(cut.at, "axis", f"axis `{axis}` cuts the tensor twice")
                    seen.add(axis)
        whole = {cut.axis for branch in parts for cut in branch.cuts} | {cut.axis for cut in in_name}
        return frozenset(axis for name in whole for axis in factors.get(name, (name,)))

    def leaves(
        self,
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
        all_axes = set(self.flat.all_axes)
        axis_leaves = frozenset(
            {leaf for dims in target_dims for leaf in dims if leaf in all_axes}
            | {capture.name for side in equation.targets for capture in captures(side.name) if capture.name in all_axes}
        )
        used_as_dims = frozenset(name for name in source_names if any(name in dims for dims in target_dims))
        named = tuple(frozenset(c.name for c in captures(side.name)) & source_dims for side in equation.targets)
        for number, branch in enumerate(parts):
            self.conserved(equation, number, branch, targets, axis_leaves)
        for number, side in enumerate(equation.targets):
            self.spelled(equation, side, source_names, source_dims if parts else set(), axis_leaves, number)
        numbers = cut_names | used_as_dims | (source_names & all_axes) | in_part_of_component(equation.source)
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

    def spelled(
        self, equation: Equation, side: Side, names: set[str], dims: set[str], axis_leaves: frozenset[str], number: int
    ) -> None:
        """Everything that a logical name captures must come from the left."""
        for capture in captures(side.name):
            if capture.name not in names | dims | axis_leaves:
                known = sorted(names | dims | set(self.flat.all_axes))
                self.fail(
                    capture.at, "name", f"`{{{capture.name}}}` is only on the right", nearest(capture.name, known)
                )
        there = {capture.name for capture in captures(side.name)}
        if equation.layout is not None:
            there |= {dim.name for dim in _named_dims(side.layout, equation, number)}
        for capture in captures(equation.source):
            if capture.name not in there and capture.name not in self.flat.all_axes:
                self.fail(
                    capture.at,
                    "name",
                    f"`{{{capture.name}}}` is only on the left",
                    f"name it on the right, as {{{capture.name}}} or as a dim",
                )

    def conserved(
        self,
        equation: Equation,
        number: int,
        branch: Branch,
        targets: tuple[Layout, ...] | None,
        axis_leaves: frozenset[str],
    ) -> None:
        """The dims of a part are those of its tensor."""
        assert targets is not None and equation is not None
        target = targets[number]
        written = equation.targets[number].layout
        right_dims = [dim for group in branches_in(target)[0].dims for dim in group if dim.name != "1"]
        left_dims = [dim for group in branch.dims for dim in group if dim.name != "1"]
        left_names, right_names = captures(equation.source), captures(equation.targets[number].name)
        self.known_dims((*left_dims, *right_dims))
        left = [dim.name for dim in left_dims] + [c.name for c in left_names]
        right = [dim.name for dim in right_dims] + [c.name for c in right_names]
        for side, dims in (("left", left_dims), ("right", right_dims)):
            names = [dim.name for dim in dims]
            for dim in dims:
                if names.count(dim.name) > 1:
                    self.fail(
                        dim.at,
                        "dims",
                        f"`{dim.name}` stands twice in one part on the {side}: which is which?",
                        f"give one of them a second name: `let {_second(dim.name)} = {dim.name}`",
                    )
        for dim in left_dims:
            if dim.name not in right:
                at = dim.at if written is not None else dim.at
                self.fail(at, "dims", f"`{dim.name}` is only on the left", nearest(dim.name, set(right) - set(left)))
        for dim in right_dims:
            if dim.name not in left and dim.name not in axis_leaves:
                self.fail(
                    dim.at, "dims", f"`{dim.name}` is only on the right", nearest(dim.name, set(left) | self._sizes())
                )
            if dim.name in [c.name for c in right_names]:
                self.fail(dim.at, "dims", f"`{dim.name}` is a dim and in the name: it can be one of them")

    def _sizes(self) -> set[str]:
        return set(self.flat.all_sizes)

    def known_dims(self, dims: Iterable[Dim]) -> None:
        known = {*self.flat.all_sizes, *self.flat.all_axes, *self._captured()}
        for dim in dims:
            if dim.literal is None and dim.name not in known:
                hint = nearest(dim.name, known) or f"declare it: `size {dim.name}`"
                self.fail(dim.at, "size", f"`{dim.name}` is not declared", hint)

    def clauses(self, equation: Equation, ready: Ready) -> None:
        for reduce in equation.reduces:
            for axis in reduce.axes:
                if axis in ready.axes:
                    self.fail(
                        reduce.at, "axis", f"axis `{axis}` cuts the tensor: there are no replicas to {_verb(reduce)}"
                    )
            if reduce.kind == "sum" and equation.arrow == "<->":
                self.fail(reduce.at, "inverse", "a sum cannot be undone", "write `->`: import only")
        self.narrowing(equation, ready)

    def narrowing(self, equation: Equation, ready: Ready) -> None:
        if equation.lossy or ready.layout is None or equation.layout is None or equation.layout.dtype is None:
            return
        for side in equation.targets:
            here, there = equation.layout.dtype, side.layout.dtype if side.layout else None
            if there is None:
                continue
            directions = ((equation.imports, here, there), (equation.exports, there, here))
            for allowed, source, target in directions:
                if allowed and narrows(source, target):
                    self.fail(
                        equation.at,
                        "lossy",
                        f"{source} to {target} loses digits",
                        "say `lossy` at the end of the rule, or use a one-way arrow",
                    )

    # Over all rules

    def unused(self, rules: Sequence[Ready]) -> None:
        """What is declared and never used is a typing error, mostly."""
        used = self._used(rules)
        for sizes in self.flat.sizes:
            for name in sizes.names:
                if name not in used:
                    self.fail(
                        sizes.at, "size", f"size `{name}` is declared and never used", nearest(name, used), word=name
                    )
        conditions = [c for eq in self.flat.equations for c in eq.conditions] + [
            c for t in self.flat.ties for c in t.conditions
        ]
        for flag in self.flat.flags:
            if flag not in {condition.flag for condition in conditions}:
                self.fail(self._declared_at(flag), "flag", f"flag `{flag}` is declared and never used", word=flag)

    def _used(self, rules: Sequence[Ready]) -> set[str]:
        used: set[str] = set()
        for ready in rules:
            for layout in (ready.layout, *(ready.targets or ())):
                used |= {name for dim in (layout.dims if layout else ()) for name in names_in(dim) | _aligners(dim)}
            for pattern in (ready.equation.source, *(side.name for side in ready.equation.targets)):
                used |= {capture.name for capture in captures(pattern)}
                arithmetic = [c.offset for c in captures(pattern) if c.offset] + [c.value for c in computed(pattern)]
                used |= {name for value in arithmetic for name in names_of(value)}
        for let in self.flat.lets:
            used |= names_of(let.value)
        for pack in self.flat.packs:
            used |= names_in(pack.expr)
        for state in self.flat.states:
            used |= {name for dim in (state.layout.dims if state.layout else ()) for name in names_in(dim)}
        return used

    def ambiguous(self, rules: Sequence[Ready]) -> None:
        """No tensor name may match two rules that can hold together."""
        matchers = [Matcher.of(ready.equation.source, ready.numbers) for ready in rules]
        for b, second in enumerate(rules):
            for a, first in enumerate(rules[:b]):
                one, other = first.equation, second.equation
                if _exclusive(one.conditions, other.conditions) or not (one.imports and other.imports):
                    continue
                example = both_match(matchers[a], matchers[b])
                if example is not None:
                    self.fail(
                        other.source.at or other.at,
                        "match",
                        f"`{example}` would match this rule and that of line {one.at[0] if one.at else '?'}",
                        "a tensor belongs to one rule; rules under opposite conditions may share names",
                    )
                if self._same_product(one, other):
                    self.fail(
                        other.at,
                        "cover",
                        f"this rule and that of line {one.at[0] if one.at else '?'} produce the same logical tensor",
                        "make both optional if only one is ever there, or name two tensors and `tie` them",
                    )

    def _same_product(self, one: Equation, other: Equation) -> bool:
        if one.optional or other.optional:
            return False
        mine = {_shape_of(side.name) for side in one.targets}
        return any(_shape_of(side.name) in mine for side in other.targets)


def _aligners(expr: Expr) -> set[str]:
    """Names that say what padding is aligned to."""
    if isinstance(expr, Dim):
        return set()
    if isinstance(expr, Pad):
        return names_of(expr.align) if expr.align else set()
    inner = (expr.item,) if isinstance(expr, Every) else expr.items if isinstance(expr, Product) else expr.parts
    return {name for part in inner for name in _aligners(part)}


def names_of(value: Arith) -> set[str]:
    """Names in arithmetic."""
    if isinstance(value, Operation):
        return names_of(value.left) | names_of(value.right)
    return {value.name} if isinstance(value, Name) else set()


def _named_dims(layout: Layout | None, equation: Equation, number: int) -> list[Dim]:
    assert equation.layout is not None
    chosen = layout or default_targets(equation.layout)[number]
    return [dim for group in branches_in(chosen)[0].dims for dim in group]


def _shape_of(pattern: Pattern) -> tuple[object, ...]:
    return tuple(part if isinstance(part, str) else Capture for part in pattern.parts)


def _exclusive(first: Sequence[Condition], second: Sequence[Condition]) -> bool:
    """Whether two lists of conditions can never hold together."""
    wanted = {condition.flag: condition.wanted for condition in first}
    return any(wanted.get(condition.flag, condition.wanted) != condition.wanted for condition in second)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _second(name: str) -> str:
    if name.isdecimal():
        return "half" if name == "2" else f"n{name}"
    return f"{name}b" if name[-1].isdecimal() else f"{name}2"


def _verb(reduce: Reduce) -> str:
    return {"any": "choose from", "mean": "average", "sum": "add up"}[reduce.kind]
