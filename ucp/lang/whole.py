"""The checks over a whole program: declarations, what is never used, and rules that get in each other's way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.lang.ast import Capture, Pack, Pattern
from ucp.lang.error import nearest
from ucp.lang.flat import exclusive
from ucp.lang.match import Matcher, captures, computed
from ucp.lang.overlap import Nearby, both_match
from ucp.lang.plain_names import check_names, check_ties
from ucp.lang.scope import Scope, aligners, names_of
from ucp.lang.sides import Ready
from ucp.lang.solve import cuts_in, dims_in, names_in
from ucp.lang.sums import evaluate
from ucp.layout.branches import branches_in

_OUT_OF_REACH = 1 << 62


def check_declarations(scope: Scope) -> None:
    """Declarations by themselves: nothing twice, everything they name is there."""
    _twice(scope)
    flat = scope.flat
    for factor in flat.factors:
        if factor.axis not in flat.axes:
            scope.fail(factor.at, "axis", f"`{factor.axis}` is no axis of the mesh", nearest(factor.axis, flat.axes))
    for let in flat.lets:
        scope.arithmetic(let.value)
    _states(scope)
    for pack in flat.packs:
        _pack(scope, pack)
    check_names(scope)
    check_ties(scope)


def _twice(scope: Scope) -> None:
    flat = scope.flat
    seen: dict[str, str] = {}
    # A part of a factored axis may be a `let` too: that is how its number of ranks is said.
    declared = [(name, "axis") for name in flat.all_axes if name not in flat.all_sizes]
    declared += [(name, "size") for name in flat.all_sizes] + [(name, "flag") for name in flat.flags]
    for name, kind in declared:
        if name in seen:
            both = "" if seen[name] == kind else f", as {seen[name]} and {kind}"
            scope.fail(scope.declared_at(name), "name", f"`{name}` is declared twice{both}", word=name)
        seen[name] = kind


def _pack(scope: Scope, pack: Pack) -> None:
    scope.padding(pack.expr)
    scope.known_axes([(cut.axis, cut.at) for cut in cuts_in(pack.expr)])
    known = {"param", *scope.flat.all_sizes}
    for dim in dims_in(pack.expr):
        if dim.name not in known and dim.literal is None:
            scope.fail(dim.at, "pack", f"`{dim.name}` is not declared", nearest(dim.name, known))


def _states(scope: Scope) -> None:
    seen: set[str] = set()
    for state in scope.flat.states:
        for name in state.names:
            if name in seen or name == "value":
                cause = "`value` is always there" if name == "value" else f"state `{name}` is described twice"
                scope.fail(state.at, "state", cause, word=name)
            seen.add(name)
        scope.known_axes([(axis, state.at) for axis in state.each])
        scope.reduces(state.reduces)
        if state.layout is not None and branches_in(state.layout) and len(branches_in(state.layout)) > 1:
            scope.fail(state.at, "state", "a state's own layout has one part")


def check_use(scope: Scope, rules: Sequence[Ready]) -> None:
    """What is declared and never used is a typing error, mostly."""
    used = _used(scope, rules)
    for sizes in scope.flat.sizes:
        for name in sizes.names:
            if name not in used:
                scope.fail(
                    sizes.at, "size", f"size `{name}` is declared and never used", nearest(name, used), word=name
                )
    conditions = [c for eq in scope.flat.equations for c in eq.conditions] + [
        c for t in scope.flat.ties for c in t.conditions
    ]
    for flag in scope.flat.flags:
        if flag not in {condition.flag for condition in conditions}:
            scope.fail(scope.declared_at(flag), "flag", f"flag `{flag}` is declared and never used", word=flag)


def _used(scope: Scope, rules: Sequence[Ready]) -> set[str]:
    used: set[str] = set()
    for ready in rules:
        for layout in (ready.layout, *(ready.targets or ())):
            used |= {name for dim in (layout.dims if layout else ()) for name in names_in(dim) | aligners(dim)}
        for pattern in (ready.equation.source, *(side.name for side in ready.equation.targets)):
            used |= {capture.name for capture in captures(pattern)}
            arithmetic = [c.offset for c in captures(pattern) if c.offset] + [c.value for c in computed(pattern)]
            used |= {name for value in arithmetic for name in names_of(value)}
    for let in scope.flat.lets:
        used |= names_of(let.value)
    for pack in scope.flat.packs:
        used |= names_in(pack.expr) | aligners(pack.expr)
    for state in scope.flat.states:
        used |= {name for dim in (state.layout.dims if state.layout else ()) for name in names_in(dim)}
    return used


def check_overlaps(scope: Scope, rules: Sequence[Ready]) -> None:
    """No tensor name may match two rules that can hold together."""
    defaults = {name: n.default for n in scope.flat.sizes if n.default is not None for name in n.names}
    matchers = [
        Matcher.of(ready.equation.source, ready.numbers, _offsets(ready.equation.source, defaults)) for ready in rules
    ]
    nearby = Nearby()
    producers: dict[tuple[object, ...], list[int]] = {}
    for b, second in enumerate(rules):
        products = {_shape_of(side.name) for side in second.equation.targets}
        alike = {a for product in products for a in producers.get(product, ())}
        for a in sorted({*nearby.met(matchers[b], b), *alike}):
            one, other = rules[a].equation, second.equation
            together = (one.imports and other.imports, one.exports and other.exports)
            if exclusive(one.conditions, other.conditions) or not any(together):
                continue
            example = both_match(matchers[a], matchers[b])
            if example is not None and all(matchers[i].match(example) is not None for i in (a, b)):
                scope.fail(
                    other.source.at or other.at,
                    "match",
                    f"`{example}` would match this rule and that of line {one.at[0] if one.at else '?'}",
                    "a tensor belongs to one rule; rules under opposite conditions may share names",
                )
            if a in alike and together[0] and not (one.optional or other.optional):
                scope.fail(
                    other.at,
                    "cover",
                    f"this rule and that of line {one.at[0] if one.at else '?'} produce the same logical tensor",
                    "make both optional if only one is ever there, or name two tensors and `tie` them",
                )
        for product in products:
            producers.setdefault(product, []).append(b)


def _offsets(pattern: Pattern, sizes: Mapping[str, int]) -> dict[str, int]:
    """Offsets of captured numbers; one that is not known yet is so large that no number reaches it."""
    found = {}
    for capture in captures(pattern):
        if capture.offset is not None:
            value = evaluate(capture.offset, sizes.get)
            found[capture.name] = _OUT_OF_REACH if value is None else int(value)
    return found


def _shape_of(pattern: Pattern) -> tuple[object, ...]:
    return tuple(part if isinstance(part, str) else Capture for part in pattern.parts)
