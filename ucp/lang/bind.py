"""Binding a program to real shards: every check that names and shapes allow, and the blocks that come of it.

No tensor byte is needed. After `bind` each element of each logical tensor is known to lie in at least one shard, and
where; elements that several shards hold are replicas, to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ucp.errors import FitError
from ucp.lang.ast import Program
from ucp.lang.check import Checked, Ready, check
from ucp.lang.choose import Match, choices, holds, undecided
from ucp.lang.coverage import Piece, place
from ucp.lang.held import Held
from ucp.lang.observe import lengths, numbers
from ucp.lang.recorded import Placements, check_recorded, check_sizes
from ucp.lang.shards import Compiler, Part
from ucp.lang.siblings import check_siblings
from ucp.lang.solve import Cuts, Solver, UnknownSizeError, solve
from ucp.layout import Box, Mesh, Shape
from ucp.layout.block import View
from ucp.layout.setting import Setting

Key = tuple[str, str]
"""Logical name and state."""
Found = tuple[int, Part]
"""Number of a shard, and a region that it holds."""


@dataclass(frozen=True, slots=True)
class Logical:
    """One state of one logical tensor: whole shape, dtype, the program's text for each dim, and its view."""

    shape: Shape
    dtype: str
    dims: tuple[str, ...]
    view: View


@dataclass(frozen=True, slots=True)
class Bound:
    """A program bound to shards.

    `tensors` and `pieces` are keyed by (logical name, state); `ties` map aliases to names; `dropped` are indices of
    shards that the program drops; `reduces` says of which tensors the copies are averaged (``mean``) or added
    (``sum``) and not compared. `uses` counts the shards that each rule took, by its number.
    """

    program: Program
    checked: Checked
    setting: Setting
    flags: Mapping[str, bool]
    tensors: Mapping[Key, Logical]
    pieces: Mapping[Key, tuple[Piece, ...]]
    ties: Mapping[str, str]
    reduces: Mapping[Key, str]
    dropped: tuple[int, ...]
    uses: Mapping[int, int]

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every size that is known."""
        return self.setting.sizes


def bind(
    program: Program,
    held: Sequence[Held],
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
) -> Bound:
    """Bind `program` to the shards `held`.

    `sizes` are given and must agree with the shapes; `config` is asked where shapes do not tell. `flags` that are not
    given are found where names and shapes allow one choice only. `cuts` and `placements` are what the source records
    of uneven cuts and of placements, as in `Setting`.

    ProgramError for a program that is wrong by itself, FitError where it and the shards do not fit: a tensor that no
    rule or that two match, a rule that matches nothing, sizes that contradict each other or cannot be told, a dim that
    its axis does not divide, a part of a logical tensor that no shard holds.
    """
    checked = check(program)
    check_recorded(checked, cuts or {}, placements or {})
    check_sizes(checked, sizes or {})
    known = {**checked.defaults, **(config or {}), **(sizes or {})}
    given = _Given(checked, held, mesh, sizes or {}, config or {}, cuts or {}, placements or {})
    names = [shard.name for shard in held]
    return _settled(given, choices(checked, names, flags or {}, mesh, known)).bound()


@dataclass(frozen=True, slots=True)
class _Given:
    """What `bind` was called with."""

    checked: Checked
    held: Sequence[Held]
    mesh: Mesh
    sizes: Mapping[str, int]
    config: Mapping[str, int]
    cuts: Cuts
    placements: Placements


def _settled(given: _Given, found: Sequence[tuple[dict[str, Match], dict[str, bool]]]) -> _Compiled:
    """The one choice of flags that the shapes do not contradict.

    A choice under which a size cannot be told is not contradicted: another must not win by needing fewer sizes.
    """
    if len(found) == 1:
        return _compiled(given, *found[0])
    fitting: list[tuple[dict[str, bool], _Compiled | UnknownSizeError]] = []
    refuted: list[FitError] = []
    for matches, chosen in found:
        try:
            fitting.append((chosen, _compiled(given, matches, chosen)))
        except UnknownSizeError as error:
            fitting.append((chosen, error))
        except FitError as error:
            refuted.append(error)
    if not fitting:
        raise undecided(given.checked, [chosen for _, chosen in found], f"{refuted[0].message}; and names do not tell")
    if len(fitting) > 1:
        raise undecided(given.checked, [chosen for chosen, _ in fitting])
    outcome = fitting[0][1]
    if isinstance(outcome, UnknownSizeError):
        raise outcome
    return outcome


def _compiled(given: _Given, matches: Mapping[str, Match], chosen: Mapping[str, bool]) -> _Compiled:
    """Solve for sizes and compile every shard, with the flags `chosen`."""
    checked, held = given.checked, given.held
    solver = solve(
        checked.flat,
        lengths(checked, matches, held),
        numbers(checked, matches, held),
        mesh=given.mesh,
        sizes=given.sizes,
        config=given.config,
        cuts=given.cuts,
        placements=given.placements,
    )
    setting = solver.setting(given.placements)
    compiler = Compiler(checked, solver, setting, {**chosen, **{axis: n > 1 for axis, n in solver.mesh.items()}})
    found: dict[Key, list[Found]] = {}
    dropped: list[int] = []
    uses: dict[int, int] = {}
    for number, shard in enumerate(held):
        match = matches[shard.name]
        if match.rule is None:
            dropped.append(number)
            continue
        uses[match.rule] = uses.get(match.rule, 0) + 1
        for part in compiler.compile(shard, match):
            found.setdefault((part.name, shard.state), []).append((number, part))
    return _Compiled(_Parts(checked, held, solver, setting, chosen), compiler, found, tuple(dropped), uses)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """All blocks of all shards; whether they make up whole tensors is not looked at yet."""

    parts: _Parts
    compiler: Compiler
    found: dict[Key, list[Found]]
    dropped: tuple[int, ...]
    uses: Mapping[int, int]

    def bound(self) -> Bound:
        """The program bound. FitError for what is missing, or there twice."""
        produced: dict[int, list[str]] = {}
        states = dict.fromkeys(state for _, state in self.found)
        state = "value" if "value" in states else next(iter(states), "")
        for (name, other), parts in self.found.items():
            if other == state:
                produced.setdefault(parts[0][1].rule, []).append(name)
        solver = self.parts.solver
        check_siblings(self.parts.checked, self.compiler.flags, produced, {**solver.mesh, **solver.sizes})
        return _assembled(self.parts, self.found, self.dropped, self.uses)


@dataclass(frozen=True, slots=True)
class _Parts:
    checked: Checked
    held: Sequence[Held]
    solver: Solver
    setting: Setting
    flags: Mapping[str, bool]


def _assembled(
    parts: _Parts, found: dict[Key, list[Found]], dropped: tuple[int, ...], uses: Mapping[int, int]
) -> Bound:
    ties = _ties(parts, found)
    tensors, pieces, reduces = {}, {}, {}
    for key, blocks in found.items():
        if key[0] in ties:
            continue
        aliases = [alias for alias, name in ties.items() if name == key[0]]
        copies = [(alias, found.get((alias, key[1]), [])) for alias in aliases]
        _one_rule(parts, key, blocks)
        tensors[key] = _logical(parts, key, blocks)
        for alias, others in copies:
            _same_tensor(parts, key, alias, tensors[key], others)
        merged = [*blocks, *(part for _, others in copies for part in others)]
        pieces[key], kind = _placed(parts, key, tensors[key], merged)
        if kind:
            reduces[key] = kind
    return Bound(
        parts.checked.program, parts.checked, parts.setting, parts.flags, tensors, pieces, ties, reduces, dropped, uses
    )


def _ties(parts: _Parts, found: Mapping[Key, object]) -> dict[str, str]:
    """Aliases that hold now, each with the tensor that holds the data."""
    names = {name for name, _ in found}
    flags = {**parts.flags, **{axis: n > 1 for axis, n in parts.solver.mesh.items()}}
    ties = {}
    for tie in parts.checked.flat.ties:
        alias, name = ("".join(str(part) for part in pattern.parts) for pattern in (tie.alias, tie.name))
        if not holds(tie.conditions, flags) or not {alias, name} & names:
            continue
        if name not in names:
            raise FitError(f"{alias} is tied to {name}, which no shard holds")
        ties[alias] = name
    return ties


def _one_rule(parts: _Parts, key: Key, blocks: Sequence[Found]) -> None:
    """Two rules for one logical tensor would compare what the author may have meant to be two tensors."""
    rules = sorted({part.rule for _, part in blocks})
    if len(rules) > 1:
        first, second = (parts.checked.where(parts.checked.rules[rule].equation) for rule in rules[:2])
        raise FitError(
            f"{key[0]} is produced by two rules, {first} and {second}",
            hint="name two tensors and `tie` them, or `drop` one",
        )


def _logical(parts: _Parts, key: Key, blocks: Sequence[Found]) -> Logical:
    number, first = blocks[0]
    for other, part in blocks:
        if part is first:
            continue
        if part.dtype != first.dtype:
            raise FitError(f"{key[0]}: {parts.held[number]} is {first.dtype}, but {parts.held[other]} is {part.dtype}")
        if part.view != first.view:
            one, two = list(first.view.tensor), list(part.view.tensor)
            raise FitError(f"{key[0]}: {parts.held[number]} makes it {one}, but {parts.held[other]} {two}")
        if part.pads != first.pads and part.rule == first.rule:
            raise FitError(
                f"{key[0]}: {parts.held[number]} has {sum(first.pads)} of padding over the whole tensor, but "
                f"{parts.held[other]} has {sum(part.pads)}",
                hint="a shard is of another save, or the program pads or cuts the tensor otherwise than the framework",
            )
    return Logical(first.view.tensor, first.dtype, first.dims, first.view)


def _same_tensor(parts: _Parts, key: Key, alias: str, tensor: Logical, others: Sequence[Found]) -> None:
    for number, part in others:
        if part.view != tensor.view or part.dtype != tensor.dtype:
            raise FitError(
                f"{alias} is tied to {key[0]}, but {parts.held[number]} is {part.dtype} {list(part.view.tensor)}, "
                f"not {tensor.dtype} {list(tensor.shape)}"
            )


def _placed(parts: _Parts, key: Key, tensor: Logical, blocks: Sequence[Found]) -> tuple[tuple[Piece, ...], str | None]:
    kinds = {part.reduce.kind for _, part in blocks if part.reduce is not None}
    if "any" in kinds:
        blocks = _first_along(parts, blocks)
    found, hole = place([(n, part.block) for n, part in blocks if part.block is not None], tensor.view.shape)
    if hole is not None:
        raise _missing(key, tensor, hole)
    reducing = sorted(kinds - {"any"})
    if not reducing:
        return tuple(found), None
    return tuple(_terms(parts, key, blocks, found)), reducing[0]


def _first_along(parts: _Parts, blocks: Sequence[Found]) -> list[Found]:
    """Copies along the axes of ``any`` are not looked at: only the first of each region is kept along them."""
    kept: dict[tuple[Box, tuple[tuple[str, int], ...]], Found] = {}
    factors = {factor.axis: factor.parts for factor in parts.checked.flat.factors}
    for number, part in blocks:
        any_axes = part.reduce.axes if part.reduce is not None and part.reduce.kind == "any" else ()
        gone = {*factors, *any_axes, *(fine for axis in any_axes for fine in factors.get(axis, ()))}
        coordinate = parts.solver.coordinate(parts.held[number].coordinate)
        rest = tuple(sorted((axis, index) for axis, index in coordinate.items() if axis not in gone))
        if part.block is not None:
            kept.setdefault((part.block.box, rest), (number, part))
    return list(kept.values())


def _terms(parts: _Parts, key: Key, blocks: Sequence[Found], found: Sequence[Piece]) -> list[Piece]:
    """The copies that are averaged or added: one for each coordinate of the reduced axes, and replicas of each.

    FitError where a coordinate is missing: a mean over fewer would be wrong, silently.
    """
    reduce = next(part.reduce for _, part in blocks if part.reduce is not None)
    wanted = 1
    for axis in reduce.axes:
        wanted *= parts.solver.mesh[axis]
    by_region: dict[Box, dict[tuple[int, ...], list[Piece]]] = {}
    for piece in found:
        coordinate = parts.solver.coordinate(parts.held[piece.held].coordinate)
        at = tuple(coordinate.get(axis, 0) for axis in reduce.axes)
        by_region.setdefault(piece.block.box, {}).setdefault(at, []).append(piece)
    terms: list[Piece] = []
    for held in by_region.values():
        if len(held) != wanted:
            raise FitError(
                f"{key[0]}: a {reduce.kind} over {' '.join(reduce.axes)} needs {wanted} copies, {len(held)} are there"
            )
        for term, at in enumerate(sorted(held)):
            terms.extend(replace(piece, replica=n, term=term) for n, piece in enumerate(held[at]))
    return terms


def _missing(key: Key, tensor: Logical, hole: Box) -> FitError:
    state = "" if key[1] == "value" else f"[{key[1]}]"
    factors = [n for group in tensor.view.factors for n in group]
    where = ", ".join(f"{a}..{b} of {n}" for a, b, n in zip(hole.start, hole.stop, factors, strict=True))
    return FitError(
        f"{key[0]}{state} {list(tensor.shape)} ({', '.join(tensor.dims)}): no shard holds {where}",
        hint="a rank's tensors are missing, or the program cuts the tensor otherwise than the framework",
    )


__all__ = ["Bound", "Held", "Logical", "Match", "Piece", "Placements", "Ready", "bind"]
