"""What names and shapes of shards say about sizes: the length of each dim, and the numbers in names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.errors import FitError
from ucp.lang.check import Checked, Ready
from ucp.lang.choose import Match
from ucp.lang.held import Held
from ucp.lang.match import captures, describe
from ucp.lang.solve import Numbered, Observation, axes_of
from ucp.layout.branches import axes
from ucp.layout.expr import Layout


def lengths(checked: Checked, matches: Mapping[str, Match], held: Sequence[Held]) -> list[Observation]:
    """The length of each dim of each shard, once for each rule, shape and coordinate.

    FitError for a shard with another number of dims than its rule.
    """
    own = {name for state in checked.flat.states if state.layout or state.lacking for name in state.names}
    cutting = {ready.equation.number: axes(ready.layout) if ready.layout else () for ready in checked.rules}
    seen: set[tuple[object, ...]] = set()
    found: list[Observation] = []
    for shard in held:
        rule = matches[shard.name].rule
        layout = None if rule is None else checked.rules[rule].layout
        if rule is None or layout is None or shard.state in own:
            continue
        at = tuple((axis, shard.coordinate[axis]) for axis in cutting[rule] if axis in shard.coordinate)
        if (rule, shard.shape, at) in seen:
            continue
        seen.add((rule, shard.shape, at))
        _same_rank(checked, checked.rules[rule], layout, shard)
        for dim, (expr, length) in enumerate(zip(layout.dims, shard.shape, strict=True)):
            found.append(Observation(shard.name, dim, expr, length, at))
    return found


def _same_rank(checked: Checked, ready: Ready, layout: Layout, shard: Held) -> None:
    if len(layout.dims) != len(shard.shape):
        raise FitError(
            f"{shard.name} has shape {list(shard.shape)}, but {checked.where(ready.equation)} gives it "
            f"{len(layout.dims)} dims",
            hint=f"the rule is for {describe(ready.equation.source)}",
        )


def numbers(checked: Checked, matches: Mapping[str, Match], held: Sequence[Held]) -> list[Numbered]:
    """The local numbers that names show for every captured leaf, over all rules together."""
    wanted = {
        ready.equation.number: [
            (capture.name, axes_of(capture.cuts))
            for capture in captures(ready.equation.source)
            if capture.name in ready.numbers
            and capture.name not in checked.flat.all_axes
            and not any(cut.placed for cut in capture.cuts)
        ]
        for ready in checked.rules
    }
    found: dict[tuple[str, tuple[str, ...]], dict[tuple[int, ...], set[int]]] = {}
    for shard in held:
        match = matches[shard.name]
        if match.rule is None:
            continue
        for name, cut in wanted[match.rule]:
            at = tuple(shard.coordinate.get(axis, 0) for axis in cut)
            value = match.values[name]
            assert isinstance(value, int)
            found.setdefault((name, cut), {}).setdefault(at, set()).add(value)
    return [Numbered(name, cut, seen) for (name, cut), seen in found.items()]
