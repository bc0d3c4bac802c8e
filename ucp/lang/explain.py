"""What a program does with one tensor: its rule, and which part of which shard is which part of the logical tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent

from ucp.errors import FitError, UsageError
from ucp.lang.ast import Program
from ucp.lang.bind import Bound
from ucp.lang.check import Checked, Ready, check
from ucp.lang.choose import holds, matcher
from ucp.lang.export import Exporter
from ucp.lang.held import Held
from ucp.lang.match import Matcher, captures, describe, nearest
from ucp.lang.numbering import Values
from ucp.lang.shards import Compiler
from ucp.lang.solve import Solver, solve
from ucp.lang.trial import unknown_sizes
from ucp.lang.words import filled, in_shard, in_tensor, order
from ucp.layout import Mesh, Shape
from ucp.layout.block import Block, View
from ucp.layout.compile import globalize
from ucp.layout.spell import spell as spell_dim


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a shard, `here`, and the part of the logical tensor `name`, `there`, that it is.

    `order` says whether the elements lie ``transposed`` or ``reordered``; "" where they do not. `replica` is 0 for the
    copy that is read, and counts those that are compared with it; None where there is no checkpoint.
    """

    name: str
    shape: Shape
    here: str
    there: str
    elements: int
    order: str
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """The shard `name` of `shape` at one coordinate, and the regions it is made of; the rest of it is padding.

    `held` is its number among the shards of the checkpoint, where there is one.
    """

    name: str
    coordinate: Mapping[str, int]
    shape: Shape
    regions: tuple[Region, ...]
    held: int | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One rule, as far as it concerns the tensor `name`, which is a `source` name or a `logical` one.

    `text` are the lines of the program. `layout` is how the source lies, and `filled` the same with the local sizes of
    the first of `holdings`. `replicas` are the axes along which copies are held. `lacking` are the sizes without which
    nothing more can be said; then there are no `holdings`.
    """

    name: str
    side: str
    ready: Ready
    text: str
    layout: str | None
    filled: str | None
    inverse: str
    replicas: tuple[str, ...]
    holdings: tuple[Holding, ...]
    lacking: tuple[str, ...] = ()


def explain(
    program: Program,
    name: str,
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
) -> list[Explanation]:
    """Every rule that could concern the tensor `name`, of the source or logical, at `mesh`. No checkpoint is needed.

    Flags that are not given leave rules for both of their values. UsageError if no rule is for such a name.
    """
    checked = check(program)
    solver = solve(checked.flat, [], [], mesh=mesh, sizes=sizes or {}, config={}, cuts={})
    return _telling([_static(checked, solver, name, *found) for found in _found(checked, name, flags or {}, solver)])


def explain_bound(bound: Bound, held: Sequence[Held], name: str, *, state: str = "value") -> list[Explanation]:
    """The rule of the tensor `name`, of the source or logical, and where it lies in the checkpoint that is bound."""
    setting, checked = bound.setting, bound.checked
    solver = Solver(checked.flat, dict(setting.mesh.axes), dict(setting.sizes), dict(setting.cuts))
    name = bound.ties.get(name, name)
    lying = _lying(bound, held, name, state)
    found = []
    for ready, side, _ in _found(checked, name, bound.flags, solver):
        mine = _matcher(ready, solver)
        holdings = [one for one in lying if mine.match(one.name) is not None]
        if holdings or not lying:
            found.append(_explanation(checked, solver, ready, name, side, holdings))
    return _telling(found)


def _telling(found: Sequence[Explanation]) -> list[Explanation]:
    """Of a name that source and logical tensors have: what says something, and the same once."""
    kept: list[Explanation] = []
    for one in found:
        twin = next((k for k in kept if k.ready is one.ready), None)
        if twin is None:
            kept.append(one)
        elif not twin.holdings:
            kept[kept.index(twin)] = one if one.holdings else twin
        elif one.holdings and {h.regions for h in one.holdings} != {h.regions for h in twin.holdings}:
            kept.append(one)
    return kept


Match = tuple[Ready, str, Values]


def _found(checked: Checked, name: str, flags: Mapping[str, bool], solver: Solver) -> list[Match]:
    """Rules that take or make a tensor of this name, as source or as logical name."""
    at_hand = {**{axis: n > 1 for axis, n in solver.mesh.items()}, **flags}
    found: list[Match] = []
    for ready in checked.rules:
        known = [condition for condition in ready.equation.conditions if condition.flag in at_hand]
        if not holds(known, at_hand):
            continue
        values = _matcher(ready, solver).match(name)
        if values is not None:
            found.append((ready, "source", values))
        numbers = ready.numbers | ready.axis_leaves | frozenset(n for named in ready.named for n in named)
        targets = (Matcher.of(side.name, numbers).match(name) for side in ready.equation.targets)
        logical = next((values for values in targets if values is not None), None)
        if logical is not None:
            found.append((ready, "logical", logical))
    if not found:
        patterns = [p for r in checked.rules for p in (r.equation.source, *(s.name for s in r.equation.targets))]
        close = nearest(name, patterns)
        hint = f"nearest: {describe(close)}" if close else "NAME is a tensor of the source, or a logical one"
        raise UsageError(f"{checked.program.file}: no rule is for {name}", hint=hint)
    return found


def _matcher(ready: Ready, solver: Solver) -> Matcher:
    try:
        return matcher(ready, solver.sizes)
    except FitError:  # an offset that is not known: numbers are taken as they stand
        return Matcher.of(ready.equation.source, ready.numbers)


def _static(checked: Checked, solver: Solver, name: str, ready: Ready, side: str, values: Values) -> Explanation:
    cut = {c.name for c in captures(ready.equation.source) if c.cuts or c.offset} - set(checked.flat.all_axes)
    lacking = {capture for capture in cut if solver.value(capture) is None} | unknown_sizes(ready, solver)
    if lacking or ready.layout is None:
        return _explanation(checked, solver, ready, name, side, [], sorted(lacking))
    setting = solver.setting({})
    flags = {**dict.fromkeys(checked.flat.flags, True), **{axis: n > 1 for axis, n in solver.mesh.items()}}
    compiler = Compiler(checked, solver, setting, flags)
    holdings = []
    for coordinate in _coordinates(checked, ready, solver.mesh):
        for known in _whole(ready, side, values, solver, coordinate):
            made = Exporter(checked, solver, setting, flags, {}, ((ready, (known,)),), compiler)
            for shard in made.shards([coordinate]):
                regions = [
                    _region(wanted.name, shard.shape, wanted.view, wanted.block)
                    for wanted in shard.blocks
                    if side == "source" or wanted.name == name
                ]
                told = {axis: index for axis, index in coordinate.items() if solver.mesh[axis] > 1}
                holdings.append(Holding(shard.name, told, shard.shape, tuple(regions)))
    return _explanation(checked, solver, ready, name, side, holdings)


def _whole(ready: Ready, side: str, values: Values, solver: Solver, coordinate: Mapping[str, int]) -> Iterator[Values]:
    """Captured values over the whole model: of a source name at `coordinate`, or all that make a logical tensor."""
    if side == "source":
        known = dict(values)
        setting, at = solver.setting({}), solver.coordinate(coordinate)
        for capture in captures(ready.equation.source):
            local = values[capture.name]
            if capture.name in solver.mesh and local != at.get(capture.name, local):
                return
            if capture.cuts and isinstance(local, int):
                try:
                    known[capture.name] = globalize(capture.name, capture.cuts, local, setting, at)
                except FitError:  # this coordinate holds fewer
                    return
        yield known
        return
    missing = [c.name for c in captures(ready.equation.source) if c.name not in values and c.name not in solver.mesh]
    for numbers in itertools.product(*(range(solver.value(leaf) or 0) for leaf in missing)):
        yield {**values, **dict(zip(missing, numbers, strict=True))}


def _coordinates(checked: Checked, ready: Ready, mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Every coordinate on the axes by which tensors of the rule differ; factored axes as a whole."""
    coarse = {part: factor.axis for factor in checked.flat.factors for part in factor.parts}
    fine = ready.axes | {place.axis for place in ready.equation.on}
    axes = [axis for axis in checked.flat.axes if axis in {coarse.get(name, name) for name in fine}]
    for index in itertools.product(*(range(mesh[axis]) for axis in axes)):
        yield dict(zip(axes, index, strict=True))


def _lying(bound: Bound, held: Sequence[Held], name: str, state: str) -> list[Holding]:
    """Every shard that is called `name`, or that holds something of the logical tensor `name`."""
    logical = (name, state) in bound.pieces
    regions: dict[int, list[Region]] = {}
    for key, pieces in bound.pieces.items():
        if key[1] != state or (logical and key[0] != name):
            continue
        for piece in pieces:
            shard = held[piece.held]
            if logical or shard.name == name:
                region = _region(key[0], shard.shape, bound.tensors[key].view, piece.block, piece.replica)
                regions.setdefault(piece.held, []).append(region)
    shards = ((i, held[i], tuple(found)) for i, found in sorted(regions.items()))
    return [Holding(shard.name, shard.coordinate, shard.shape, found, i) for i, shard, found in shards]


def _region(name: str, shape: Shape, view: View, block: Block, replica: int | None = None) -> Region:
    there = in_tensor(block, view)
    return Region(name, view.tensor, in_shard(block, shape), there, block.size, order(block), replica)


def _explanation(
    checked: Checked,
    solver: Solver,
    ready: Ready,
    name: str,
    side: str,
    holdings: Sequence[Holding],
    lacking: Iterable[str] = (),
) -> Explanation:
    layout = ready.equation.layout or ready.layout
    text = None if layout is None else f"[{', '.join(spell_dim(dim) for dim in layout.dims)}]"
    sizes = None
    if layout is not None and holdings:
        sizes = filled(layout, solver.setting({}), solver.coordinate(holdings[0].coordinate))
    alone = ready.axes | {place.axis for place in ready.equation.on}
    replicas = tuple(axis for axis in checked.axes if axis not in alone and solver.mesh.get(axis, 1) > 1)
    return Explanation(
        name,
        side,
        ready,
        _lines(checked.program, ready),
        text,
        sizes,
        ready.inverse(checked.axes),
        replicas,
        tuple(holdings),
        tuple(lacking),
    )


def _lines(program: Program, ready: Ready) -> str:
    """The lines of the program in which the rule stands."""
    equation = ready.equation
    if equation.at is None or program.text is None:
        return f"{describe(equation.source)} {equation.arrow} {', '.join(describe(s.name) for s in equation.targets)}"
    lines = program.text.split("\n")
    first = equation.at[0] - 1
    ends = [first + 1, *(side.name.at[0] for side in equation.targets if side.name.at)]
    return dedent("\n".join(line.rstrip() for line in lines[first : max(ends)]))
