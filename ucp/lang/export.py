"""The other direction: which shards there are at a mesh, and which blocks of the logical tensors each of them is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

from ucp.errors import FitError, UsageError
from ucp.lang.ast import Pattern, Program
from ucp.lang.check import Checked, Ready, check
from ucp.lang.choose import check_open, holds, offsets
from ucp.lang.error import nearest
from ucp.lang.flat import Equation
from ucp.lang.held import Held
from ucp.lang.match import Index, Matcher, captures, describe, spell
from ucp.lang.numbering import Numbering, Values
from ucp.lang.recorded import Placements, check_recorded, check_sizes
from ucp.lang.shards import Compiler
from ucp.lang.solve import Cuts, Numbered, Observation, Solver, require, solve
from ucp.layout import Mesh, Shape
from ucp.layout.block import Block, View
from ucp.layout.expr import Expr
from ucp.layout.setting import Setting, check_count


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block of the logical tensor `name`, seen through `view`, that a shard holds."""

    name: str
    view: View
    block: Block


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor to be made: its name and local shape at `coordinate`, and what fills it. The rest is padding: zeros."""

    name: str
    shape: Shape
    coordinate: Mapping[str, int]
    blocks: tuple[Wanted, ...]
    dtype: str | None
    """Where the program says one, as it writes it."""
    tensors: tuple[str, ...] = ()
    """Logical tensors that its rule makes it of. It may have nothing of them here: all padding."""


_Made = tuple[str, Shape, tuple[Wanted, ...], str | None, tuple[str, ...]]
"""A shard without its coordinate: name, local shape, what fills it, and the dtype that the program says."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """A program at a mesh, ready to say what each coordinate holds of the logical tensors `logical`."""

    checked: Checked
    solver: Solver
    setting: Setting
    flags: Mapping[str, bool]
    logical: Mapping[str, Shape]
    """Empty where a program is looked at without tensors: then all that it names are taken to be there."""
    rules: tuple[tuple[Ready, tuple[Values, ...]], ...]
    """Active rules, each with the captured values (over the whole model) of the tensors it makes."""
    compiler: Compiler
    job: Mapping[tuple[str, tuple[tuple[str, int], ...]], Shape] = field(default_factory=dict)
    """Shapes of tensors that exist, by name and coordinate: how far they are padded."""
    _made: dict[tuple[int, str, tuple[int | None, ...]], tuple[_Made, ...]] = field(default_factory=dict, repr=False)
    _numbered: dict[int, Numbering] = field(default_factory=dict, repr=False)

    @property
    def aliases(self) -> dict[str, str]:
        """Logical names that are tied, with the name that holds the data."""
        return _tied(self.checked, self.compiler.flags)

    def shards(self, coordinates: Iterable[Mapping[str, int]], *, state: str = "value") -> Iterator[Shard]:
        """Every shard at each of `coordinates`, in order of rules.

        FitError where a cut does not come out, and for one name that two rules write.
        """
        for given in coordinates:
            written: set[str] = set()
            for ready, tensors in self.rules:
                for name, shape, blocks, dtype, of in self._held(ready, tensors, given, state):
                    if name in written:
                        raise FitError(f"{name} is written twice, last by {self.checked.where(ready.equation)}")
                    written.add(name)
                    yield Shard(name, shape, given, blocks, dtype, of)

    def _held(self, ready: Ready, tensors: Sequence[Values], given: Mapping[str, int], state: str) -> tuple[_Made, ...]:
        """The shards of one rule at a coordinate. Coordinates that hold the same share what is made."""
        number = ready.equation.number
        at = tuple([given.get(axis) for axis in self.compiler.relevant(ready)])
        if (number, state, at) not in self._made:
            coordinate = self.solver.coordinate(given)
            if number not in self._numbered:
                self._numbered[number] = Numbering.of(ready, tensors, self.solver)
            here = () if self._elsewhere(ready, coordinate) else self._numbered[number].at(coordinate, self.setting)
            self._made[number, state, at] = tuple(
                self._shard(ready, values, local, given, coordinate, state) for values, local in here
            )
        return self._made[number, state, at]

    def _elsewhere(self, ready: Ready, coordinate: Mapping[str, int]) -> bool:
        """Whether an ``on`` puts the tensor on another coordinate."""
        return any(
            self.setting.index(place.axis, coordinate) != self.setting.place(place.axis, place.index)
            for place in ready.equation.on
        )

    def _shard(
        self,
        ready: Ready,
        values: Values,
        local: Values,
        given: Mapping[str, int],
        coordinate: Mapping[str, int],
        state: str,
    ) -> _Made:
        name = spell(ready.equation.source, local, offsets(ready.equation, self.setting.sizes))
        asked = Held(name, self.job.get((name, tuple(sorted(given.items()))), ()), "", given, state)
        shape, blocks = self.compiler.wanted(ready, values, coordinate, asked, self.logical)
        layout = ready.equation.layout
        found = tuple(Wanted(*item) for item in blocks)
        for wanted in found:
            if self.logical and wanted.name not in self.logical and wanted.name not in self.aliases:
                raise FitError(f"{name} needs {wanted.name}, and there is no such tensor")
            self._check_shape(ready, wanted, state)
        of = self.compiler.targets(ready, values)
        return name, shape, found, layout.dtype if layout and state == "value" else None, of

    def _check_shape(self, ready: Ready, wanted: Wanted, state: str) -> None:
        shape = self.logical.get(wanted.name)
        if state == "value" and shape is not None and shape != wanted.view.tensor:
            raise FitError(
                f"{wanted.name} has shape {list(shape)}, but {self.checked.where(ready.equation)} makes it "
                f"{list(wanted.view.tensor)}"
            )


def export(
    program: Program,
    logical: Mapping[str, Shape],
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    ties: Mapping[str, str] | None = None,
    job: Sequence[Held] = (),
) -> Exporter:
    """Make ready to cut the tensors `logical` (names and shapes) as `program` says at `mesh`.

    `ties` are aliases that the source has for some of `logical`, by name. `job` are shards that exist already, of one
    rank or more: their shapes help to find sizes, and say how far they are padded. The rest as in `bind`.

    FitError for a logical tensor that no rule takes, and for a rule whose logical tensor is missing.
    """
    checked = check(program)
    check_recorded(checked, cuts or {}, placements or {})
    check_sizes(checked, sizes or {})
    index, places = _index(checked)
    alike = {**logical, **{alias: logical[name] for alias, name in (ties or {}).items()}}
    matched = {name: [(places[i], values) for i, values in index.find(name)] for name in alike}
    chosen = _flags(checked, matched, flags or {}, mesh, ties or {})
    written = {
        name: [place for place in found if _chosen(checked.rules[place[0][0]], chosen)]
        for name, found in matched.items()
    }
    solver = solve(
        checked.flat,
        [*_lengths(checked, written, alike), *_job_lengths(checked, job, chosen)],
        _numbers(matched, checked),
        mesh=mesh,
        sizes=sizes or {},
        config=config or {},
        cuts=cuts or {},
        placements=placements or {},
    )
    setting = solver.setting(placements or {})
    all_flags = {**chosen, **{axis: n > 1 for axis, n in solver.mesh.items()}}
    rules = tuple(_tensors(checked, solver, matched, all_flags))
    compiler = Compiler(checked, solver, setting, all_flags)
    shapes = {(shard.name, tuple(sorted(shard.coordinate.items()))): shard.shape for shard in job}
    return Exporter(checked, solver, setting, chosen, alike, rules, compiler, shapes)


_Matched = Mapping[str, list[tuple[tuple[int, int], Values]]]
"""For each logical name: (rule, target) and captured values of each pattern it matches."""


def _index(checked: Checked) -> tuple[Index, list[tuple[int, int]]]:
    matchers, places = [], []
    for ready in checked.rules:
        if not ready.equation.exports:
            continue
        numbers = _numeric(ready)
        for k, side in enumerate(ready.equation.targets):
            matchers.append(Matcher.of(side.name, numbers))
            places.append((ready.equation.number, k))
    return Index(matchers), places


def _numeric(ready: Ready) -> frozenset[str]:
    return ready.numbers | ready.axis_leaves | frozenset(name for named in ready.named for name in named)


def _flags(
    checked: Checked, matched: _Matched, flags: Mapping[str, bool], mesh: Mesh, ties: Mapping[str, str]
) -> dict[str, bool]:
    """Flags that were not given, where only one choice leaves no tensor and no rule over."""
    flat = checked.flat
    for flag in flags:
        if flag not in flat.flags:
            raise UsageError(f"{checked.program.file}: no flag {flag!r}", hint=nearest(flag, flat.flags))
    fixed = {**{axis: mesh[axis] > 1 for axis in flat.all_axes}, **flags}
    unknown = [flag for flag in flat.flags if flag not in fixed]
    check_open(checked, unknown)
    trials = [
        {**fixed, **dict(zip(unknown, values, strict=True))}
        for values in itertools.product((False, True), repeat=len(unknown))
    ]
    fitting = [trial for trial in trials if next(_problems(checked, matched, trial, ties), None) is None]
    if not fitting:
        best = min(trials, key=lambda trial: sum(1 for _ in _problems(checked, matched, trial, ties)))
        make_error = next(_problems(checked, matched, best, ties))
        raise make_error()
    if len(fitting) > 1:
        fitting = [trial for trial in fitting if _tied(checked, trial).keys() >= ties.keys()] or fitting
    if len(fitting) > 1:
        unsure = [flag for flag in unknown if len({trial[flag] for trial in fitting}) > 1]
        hint = "give " + " ".join(f"--flag {flag}=yes|no" for flag in unsure)
        raise FitError(f"{checked.program.file}: the names do not tell whether {' and '.join(unsure)}", hint=hint)
    return {flag: fitting[0][flag] for flag in flat.flags}


def _chosen(ready: Ready, flags: Mapping[str, bool]) -> bool:
    """Whether a rule's conditions hold as far as they are about `flags`; axes are left out."""
    return holds([condition for condition in ready.equation.conditions if condition.flag in flags], flags)


def _tied(checked: Checked, flags: Mapping[str, bool]) -> dict[str, str]:
    """Aliases that hold under `flags`, with the name that holds the data."""
    return {describe(tie.alias): describe(tie.name) for tie in checked.flat.ties if holds(tie.conditions, flags)}


def _problems(
    checked: Checked, matched: _Matched, flags: Mapping[str, bool], ties: Mapping[str, str]
) -> Iterator[Callable[[], FitError]]:
    """What is wrong under `flags`: makers of errors, since hints cost more than finding out."""
    active = {
        ready.equation.number
        for ready in checked.rules
        if ready.equation.exports and holds(ready.equation.conditions, flags)
    }
    used = {place for found in matched.values() for place, _ in found}
    tied = _tied(checked, flags)
    for name, found in matched.items():
        if name in tied and name not in ties:
            yield partial(_own, name, tied[name])
        elif not any(rule in active for (rule, _), _ in found) and name not in tied and name not in ties:
            yield partial(_unwritten, checked, name)
    for ready in checked.rules:
        equation = ready.equation
        if equation.number not in active or equation.optional:
            continue
        for k, side in enumerate(equation.targets):
            if (equation.number, k) not in used and tied.get(describe(side.name)) not in matched:
                yield partial(_needed, checked, equation, side.name)


def _own(alias: str, name: str) -> FitError:
    return FitError(f"{alias} is a tensor of its own, but the program ties it to {name}")


def _unwritten(checked: Checked, name: str) -> FitError:
    known = [describe(side.name) for ready in checked.rules for side in ready.equation.targets]
    return FitError(f"{name}: no rule of {checked.program.file} writes it", hint=nearest(name, known))


def _needed(checked: Checked, equation: Equation, name: Pattern) -> FitError:
    return FitError(
        f"{checked.where(equation)} needs {describe(name)}, and there is no such tensor",
        hint="a rule that may find nothing ends with `optional`",
    )


def _lengths(checked: Checked, matched: _Matched, logical: Mapping[str, Shape]) -> list[Observation]:
    """What the shapes of logical tensors say about sizes."""
    found = []
    for name, places in matched.items():
        for (rule, k), _ in places:
            ready = checked.rules[rule]
            if ready.targets is None:
                continue
            dims = ready.targets[k].dims
            if len(dims) != len(logical[name]):
                where = checked.where(ready.equation)
                raise FitError(f"{name} has shape {list(logical[name])}, but {where} gives it {len(dims)} dims")
            found += _each_dim(name, dims, logical[name], ())
    return found


def _job_lengths(checked: Checked, job: Sequence[Held], flags: Mapping[str, bool]) -> list[Observation]:
    """What the shapes of shards that exist say about sizes."""
    if not job:
        return []
    writing = [ready for ready in checked.rules if ready.equation.exports and ready.layout is not None]
    rules = [ready for ready in writing if _chosen(ready, flags)]
    index = Index(Matcher.of(ready.equation.source, ready.numbers) for ready in rules)
    found = []
    for shard in job:
        for i, _ in index.find(shard.name):
            layout = rules[i].layout
            if layout is not None and len(layout.dims) == len(shard.shape):
                found += _each_dim(shard.name, layout.dims, shard.shape, tuple(sorted(shard.coordinate.items())))
    return found


def _each_dim(
    name: str, dims: Sequence[Expr], shape: Shape, coordinate: tuple[tuple[str, int], ...]
) -> list[Observation]:
    return [Observation(name, d, dim, n, coordinate) for d, (dim, n) in enumerate(zip(dims, shape, strict=True))]


def _numbers(matched: _Matched, checked: Checked) -> list[Numbered]:
    """The size of every numbered leaf in logical names."""
    seen: dict[str, set[int]] = {}
    for places in matched.values():
        for (rule, _), values in places:
            ready = checked.rules[rule]
            wanted = {capture.name for capture in captures(ready.equation.source)} | _numeric(ready)
            for name, value in values.items():
                if isinstance(value, int) and name in wanted and name not in checked.flat.all_axes:
                    seen.setdefault(name, set()).add(value)
    return [Numbered(name, (), {(): numbers}) for name, numbers in seen.items()]


def _tensors(
    checked: Checked, solver: Solver, matched: _Matched, flags: Mapping[str, bool]
) -> Iterator[tuple[Ready, tuple[Values, ...]]]:
    """Each active rule, and the captured values of all tensors it makes of the logical ones."""
    tied = _tied(checked, flags)
    by_place: dict[tuple[int, int], list[Values]] = {}
    for places in matched.values():
        for place, values in places:
            by_place.setdefault(place, []).append(values)
    for ready in checked.rules:
        equation = ready.equation
        if not equation.exports or not holds(equation.conditions, flags):
            continue
        tensors = _values(checked, ready, by_place, matched, tied)
        if tensors:
            yield ready, tuple(_stacked(ready, solver, tensors))


def _values(
    checked: Checked,
    ready: Ready,
    by_place: Mapping[tuple[int, int], list[Values]],
    matched: _Matched,
    tied: Mapping[str, str],
) -> list[Values]:
    """Values that the names of the first target have; all targets must have the same ones."""
    equation = ready.equation
    sources = {capture.name for capture in captures(equation.source)} - ready.leaves
    merged: list[set[tuple[tuple[str, int | str], ...]]] = []
    for k, side in enumerate(equation.targets):
        found = by_place.get((equation.number, k), [])
        if not found and tied.get(describe(side.name)) in matched:
            found = [{}]
        merged.append({tuple(sorted((n, v) for n, v in one.items() if n in sources)) for one in found})
    for k, side in enumerate(equation.targets[1:], 1):
        odd = merged[0] ^ merged[k]
        if odd:
            raise FitError(
                f"{checked.where(equation)} needs both {describe(equation.targets[0].name)} and {describe(side.name)}, "
                f"but for {dict(min(odd, key=str)) or 'all'} one is missing"
            )
    return [dict(one) for one in sorted(merged[0], key=str)]


def _stacked(ready: Ready, solver: Solver, found: Sequence[Values]) -> Iterator[Values]:
    """Source numbers that are dims on the right run over their whole size."""
    names = sorted(ready.leaves)
    require(solver, names, describe(ready.equation.source))
    check_count(prod(solver.value(name) or 0 for name in names), " x ".join(names))
    for values in found:
        for numbers in itertools.product(*(range(solver.value(name) or 0) for name in names)):
            yield {**values, **dict(zip(names, numbers, strict=True))}
