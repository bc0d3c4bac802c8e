"""Sizes from shapes: every dim of every tensor is an equation, solved wherever a single size in it is unknown.

What neither shapes nor `let` decide comes from the source's configuration, then from defaults; what is left is asked
for. A size that two places put differently is an error that names both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

from ucp.errors import FitError
from ucp.lang.flat import Flat
from ucp.lang.sums import evaluate, invert
from ucp.layout import Mesh
from ucp.layout.expr import Arith, Concat, Cut, Dim, Every, Expr, Pad, Product
from ucp.layout.setting import Setting
from ucp.layout.spell import cut_name, spell, spell_arith

Cuts = Mapping[tuple[str, tuple[str, ...]], tuple[int, ...]]
Coordinate = Mapping[str, int]


class UnknownSizeError(FitError):
    """A size that neither shapes nor configuration tell; it does not say that anything is wrong."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The tensor `name` has `length` along its dim `dim`, which the program says is `expr`, at `coordinate`."""

    name: str
    dim: int
    expr: Expr
    length: int
    coordinate: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        where = ", ".join(f"{axis} {index}" for axis, index in self.coordinate)
        return f"dim {self.dim} of {self.name} is {self.length}" + (f" (at {where})" if where else "")


@dataclass(frozen=True, slots=True)
class Numbered:
    """Local numbers that names show for a captured leaf, by coordinate on the axes that cut it (outermost first)."""

    name: str
    axes: tuple[str, ...]
    seen: Mapping[tuple[int, ...], AbstractSet[int]]


@dataclass
class Solver:
    """Sizes known so far and why. `cuts` grows by the boundaries that uneven shards show."""

    flat: Flat
    mesh: dict[str, int]
    sizes: dict[str, int]
    cuts: dict[tuple[str, tuple[str, ...]], tuple[int, ...]]
    why: dict[str, str] = field(default_factory=dict)

    def learn(self, name: str, value: int | Fraction, why: str) -> bool:
        """Note a size; whether it is news. FitError if it is no whole number or contradicts what is known."""
        if value != int(value) or value < 0:
            raise FitError(f"{why}: that makes {name} = {value}, which is no size")
        known = self.sizes.get(name)
        if known is None:
            self.sizes[name], self.why[name] = int(value), why
            return True
        if known != value:
            raise FitError(
                f"{name} is {known} ({self.why.get(name, 'given')}), but {why}, which makes it {int(value)}",
                hint="a shard is of another model, or the program says the layout wrongly",
            )
        return False

    def value(self, name: str) -> int | None:
        """A size, or the number of ranks of an axis."""
        if name.isdecimal():
            return int(name)
        return self.sizes.get(name, self.mesh.get(name))

    def coordinate(self, given: Mapping[str, int]) -> dict[str, int]:
        """A coordinate with the indices on the finer axes that axes are factored into."""
        found = dict(given)
        for factor in self.flat.factors:
            index = found.get(factor.axis)
            if index is not None:
                require(self, factor.parts, f"axis {factor.axis} = {' * '.join(factor.parts)}")
                for part in reversed(factor.parts):
                    index, found[part] = divmod(index, self.mesh[part])
        return found

    def setting(self, placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]]) -> Setting:
        """What equations are compiled at."""
        return Setting(Mesh(self.mesh), self.sizes, self.cuts, placements)


def solve(
    flat: Flat,
    observations: Sequence[Observation],
    numbered: Sequence[Numbered],
    *,
    mesh: Mesh,
    sizes: Mapping[str, int],
    config: Mapping[str, int],
    cuts: Cuts,
    placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] | None = None,
) -> Solver:
    """All sizes that can be known. Those still unknown are simply not in the result; see `require`."""
    factored = {part for factor in flat.factors for part in factor.parts}
    axes = {axis: mesh[axis] for axis in (*flat.axes, *dict(mesh.axes)) if axis not in factored}
    solver = Solver(flat, axes, dict(sizes), dict(cuts), dict.fromkeys(sizes, "given"))
    for (name, _), bounds in cuts.items():
        if name.isidentifier() and bounds:
            solver.learn(name, bounds[-1], f"recorded cuts of {name} end at {bounds[-1]}")
    for (name, _), held in (placements or {}).items():
        largest = max((index for indices in held.values() for index in indices), default=-1)
        solver.learn(name, largest + 1, f"the largest {name} in its recorded placement is {largest}")
    for numbers in numbered:
        _count(solver, numbers)
    by_expr = _grouped(observations)
    wanted = {*flat.all_sizes, *(numbers.name for numbers in numbered)}
    defaults = {name: decl.default for decl in flat.sizes if decl.default is not None for name in decl.names}
    for more, why in ((None, ""), (config, "says the configuration"), (defaults, "is the program's default")):
        for name, value in (more or {}).items():
            if name in wanted and name not in solver.sizes:
                solver.learn(name, value, f"{name} = {value} {why}")
        while _step(solver, by_expr):
            pass
    for name, value in config.items():
        if name in wanted and name not in sizes:
            solver.learn(name, value, f"the configuration says {name} = {value}")
    return solver


def require(solver: Solver, names: Iterable[str], tensor: str) -> None:
    """FitError that asks for those of `names` that are unknown; `tensor` needs them."""
    missing = sorted({name for name in names if solver.value(name) is None})
    if missing:
        flags = " ".join(f"--size {name}=N" for name in missing)
        raise UnknownSizeError(
            f"{tensor}: {' and '.join(missing)} cannot be told from names and shapes", hint=f"give {flags}"
        )


def _grouped(observations: Iterable[Observation]) -> list[list[Observation]]:
    """Observations of the same expression together; one for each coordinate and length."""
    grouped: dict[tuple[Expr, int], dict[tuple[object, int], Observation]] = {}
    for seen in observations:
        grouped.setdefault((seen.expr, 0), {}).setdefault((seen.coordinate, seen.length), seen)
    return [list(group.values()) for group in grouped.values()]


def _step(solver: Solver, by_expr: Sequence[Sequence[Observation]]) -> bool:
    """One round over all equations; whether anything was learnt."""
    news = [_let(solver, let.name, let.value) for let in solver.flat.lets]
    news += [_factor(solver, factor.axis, factor.parts) for factor in solver.flat.factors]
    news += [_shape(solver, seen) for seen in by_expr]
    return any(news)


def _shape(solver: Solver, seen: Sequence[Observation]) -> bool:
    """What observations of one expression tell."""
    if len({one.length for one in seen}) == 1:
        return _length(solver, seen[0])
    news = _uneven(solver, seen)
    lengths = [_length(solver, one) for one in seen]
    return news or any(lengths)


def _length(solver: Solver, seen: Observation) -> bool:
    """Solve for the only unknown size of an observation, if there is just one."""
    unknown = {name for name in names_in(seen.expr) if solver.value(name) is None}
    if len(unknown) != 1 or has_pad(seen.expr):
        return False
    (name,) = unknown
    found = _linear(solver, seen, seen.expr, name, None)
    if found is None or found[0] == 0:
        return False
    return solver.learn(name, (seen.length - found[1]) / found[0], str(seen))


def _count(solver: Solver, numbers: Numbered) -> None:
    """The size of a captured leaf from the numbers in names. FitError for a gap: a tensor is missing."""
    if not numbers.axes:
        largest = max(numbers.seen[()])
        solver.learn(numbers.name, largest + 1, f"the largest {numbers.name} in names is {largest}")
        return
    for at, seen in numbers.seen.items():
        gap = next((n for n in range(len(seen)) if n not in seen), None)
        if gap is not None:
            where = " ".join(f"{axis} {index}" for axis, index in zip(numbers.axes, at, strict=True))
            raise FitError(f"no tensor has {numbers.name} {gap} at {where}, but some have {max(seen)}")
    lengths = {at: len(seen) for at, seen in numbers.seen.items()}
    record(solver, numbers.name, numbers.axes, lengths, f"names show {sorted(set(lengths.values()))} on each rank")


def _uneven(solver: Solver, seen: Sequence[Observation]) -> bool:
    """Shards of different lengths show where a dim was cut: lengths in rank order add up to boundaries."""
    if not cuts_in(seen[0].expr):
        other = next(one for one in seen if one.length != seen[0].length)
        raise FitError(
            f"{seen[0]}, but {other}: `{spell(seen[0].expr)}` cannot be both",
            hint="a shard is of another model, or the program says the layout wrongly",
        )
    cut = [dim for dim in dims_in(seen[0].expr) if dim.cuts and not any(c.placed for c in dim.cuts)]
    cut = [dim for dim in cut if (dim.name, axes_of(dim.cuts)) not in solver.cuts]
    if len(set(cut)) != 1:
        return False
    dim, axes = cut[0], axes_of(cut[0].cuts)
    lengths: dict[tuple[int, ...], int] = {}
    first: dict[tuple[int, ...], Observation] = {}
    for one in seen:
        found = _linear(solver, one, one.expr, dim.name, dim)
        if found is None or found[0] == 0:
            return False
        local = (one.length - found[1]) / found[0]
        if local != int(local):
            raise FitError(f"{one}: that leaves {local} of {dim.name}, which is no size")
        at = tuple(dict(one.coordinate).get(axis, 0) for axis in axes)
        if lengths.setdefault(at, int(local)) != local:
            raise FitError(
                f"{first[at]}, but {one}: that is {lengths[at]} and {local} of {dim.name} at the same place on "
                f"{' and '.join(axes)}",
                hint="a shard is of another model, or the program says the layout wrongly",
            )
        first.setdefault(at, one)
    return record(solver, dim.name, axes, lengths, f"the lengths of {seen[0].name} on each rank")


def record(solver: Solver, name: str, axes: tuple[str, ...], lengths: Mapping[tuple[int, ...], int], why: str) -> bool:
    """Note that a dim is cut into pieces of `lengths` by coordinate; whether that is news.

    Nothing is noted where a coordinate is missing: then shards are missing, and coverage tells.
    """
    if (name, axes) in solver.cuts or any(axis not in solver.mesh for axis in axes):
        return False
    if len(lengths) != prod(solver.mesh[axis] for axis in axes):
        return False
    bounds = [0]
    for at in sorted(lengths):
        bounds.append(bounds[-1] + lengths[at])
    news = solver.learn(name, bounds[-1], why)
    if len(set(lengths.values())) > 1:
        solver.cuts[name, axes] = tuple(bounds)
        return True
    return news


def _linear(
    solver: Solver, seen: Observation, expr: Expr, name: str, local: Dim | None
) -> tuple[Fraction, Fraction] | None:
    """`expr`'s local length as ``a * name + b``, or with `local` as ``a * (local length of that cut dim) + b``.

    None where something else is unknown, or the length is not linear.
    """
    if isinstance(expr, Pad | Every):
        return None
    if expr == local:
        return Fraction(1), Fraction(0)
    recorded = _recorded(solver, expr, dict(seen.coordinate)) if expr.cuts else None
    if recorded is not None:
        return Fraction(0), Fraction(recorded)
    ranks = _ranks(solver, expr.cuts)
    if ranks is None:
        return None
    if isinstance(expr, Dim):
        if expr.name == name and local is None:
            return Fraction(1, ranks), Fraction(0)
        value = solver.value(expr.name)
        return None if value is None else (Fraction(0), Fraction(value, ranks))
    inner = expr.items if isinstance(expr, Product) else expr.parts
    found = _composed(isinstance(expr, Product), [_linear(solver, seen, part, name, local) for part in inner])
    return None if found is None else (found[0] / ranks, found[1] / ranks)


def _composed(product: bool, parts: Sequence[tuple[Fraction, Fraction] | None]) -> tuple[Fraction, Fraction] | None:
    """The product or the sum of linear lengths, if it is linear."""
    a, b = Fraction(0), Fraction(1 if product else 0)
    for part in parts:
        if part is None or (product and a and part[0]):
            return None
        a, b = (a * part[1] + b * part[0], b * part[1]) if product else (a + part[0], b + part[1])
    return a, b


def _recorded(solver: Solver, expr: Dim | Product | Concat, coordinate: Coordinate) -> int | None:
    """How much of a dim with recorded cuts a coordinate holds."""
    axes = axes_of(expr.cuts)
    bounds = solver.cuts.get((cut_name(expr), axes))
    if bounds is None or any(axis not in coordinate and solver.mesh.get(axis, 1) > 1 for axis in axes):
        return None
    which = 0
    for axis in axes:
        which = which * solver.mesh[axis] + coordinate.get(axis, 0)
    return bounds[which + 1] - bounds[which] if which + 1 < len(bounds) else None


def _ranks(solver: Solver, cuts: Sequence[Cut]) -> int | None:
    """Number of pieces; None where it is unknown or a placement decides."""
    if any(cut.placed or cut.axis not in solver.mesh for cut in cuts):
        return None
    return prod(solver.mesh[cut.axis] for cut in cuts)


def axes_of(cuts: Sequence[Cut]) -> tuple[str, ...]:
    """Axes of cuts, outermost first."""
    return tuple(cut.axis for cut in cuts)


def dims_in(expr: Expr) -> list[Dim]:
    """The named dims and numbers in an expression, in order."""
    if isinstance(expr, Dim):
        return [expr]
    if isinstance(expr, Pad):
        return []
    inner = (expr.item,) if isinstance(expr, Every) else expr.items if isinstance(expr, Product) else expr.parts
    return [dim for part in inner for dim in dims_in(part)]


def cuts_in(expr: Expr) -> list[Cut]:
    """Every cut in an expression."""
    if isinstance(expr, Pad):
        return []
    if isinstance(expr, Dim):
        return list(expr.cuts)
    inner = (expr.item,) if isinstance(expr, Every) else expr.items if isinstance(expr, Product) else expr.parts
    own = [] if isinstance(expr, Every) else list(expr.cuts)
    return own + [cut for part in inner for cut in cuts_in(part)]


def names_in(expr: Expr) -> set[str]:
    """Names of the dims in an expression."""
    return {dim.name for dim in dims_in(expr)}


def has_pad(expr: Expr) -> bool:
    """Whether there is padding in an expression."""
    if isinstance(expr, Dim | Pad):
        return isinstance(expr, Pad)
    inner = (expr.item,) if isinstance(expr, Every) else expr.items if isinstance(expr, Product) else expr.parts
    return any(has_pad(part) for part in inner)


def _factor(solver: Solver, axis: str, parts: Sequence[str]) -> bool:
    """``axis = product of parts``: parts may be sizes that a `let` decides; one may be left to solve."""
    whole = solver.mesh[axis]
    known = {part: solver.mesh.get(part, solver.sizes.get(part)) for part in parts}
    held = prod(n for n in known.values() if n is not None)
    if not held:
        raise FitError(f"axis {axis} has a factor of no ranks: {' '.join(part for part, n in known.items() if n == 0)}")
    unknown = [part for part, n in known.items() if n is None]
    if whole % held or (not unknown and held != whole):
        shown = " * ".join(f"{part} {n}" for part, n in known.items() if n is not None)
        raise FitError(f"axis {axis} has {whole} ranks, which {shown} does not divide")
    if len(unknown) > 1:
        return False
    found = {**known, **dict.fromkeys(unknown, whole // held)}
    news = any(part not in solver.mesh for part in parts)
    solver.mesh.update({part: int(n or 1) for part, n in found.items()})
    return news


def _let(solver: Solver, name: str, value: Arith) -> bool:
    known = evaluate(value, solver.value)
    why = f"let {name} = {spell_arith(value)}"
    if known is not None:
        return solver.learn(name, known, why)
    target = solver.value(name)
    found = None if target is None else invert(value, Fraction(target), solver.value)
    return found is not None and solver.learn(*found, why)
