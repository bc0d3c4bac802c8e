"""Tied tensors of a source: names under which it keeps no data, and what a program makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ucp.errors import FitError
from ucp.lang import Program
from ucp.lang.ast import Tie
from ucp.lang.bind import Bound, Held
from ucp.mapping.around import Part
from ucp.plan import Key

Bind = Callable[[Sequence[Held], Mapping[str, bool]], Bound]


@dataclass(frozen=True, slots=True)
class Shards:
    """All states of all tensors of all parts, as the language sees them.

    ``origin[i]`` is where the data of ``held[i]`` lies: number of the part, and tensor and state in it. The last ones,
    from number `own` on, are aliases: names without data of their own.
    """

    held: tuple[Held, ...]
    origin: tuple[tuple[int, Key], ...]
    own: int

    @classmethod
    def of(cls, parts: Sequence[Part], *, aliases: bool = False) -> Shards:
        """The tensors of `parts`, and with `aliases` their other names too."""
        names = [(n, name, name) for n, (_, catalog) in enumerate(parts) for name in catalog.tensors]
        ties = [(n, alias, name) for n, (_, catalog) in enumerate(parts) for alias, name in catalog.ties.items()]
        held, origin, own = [], [], 0
        for number, name, holder in names + ties * aliases:
            coordinate, catalog = parts[number]
            for state, spec in catalog.tensors[holder].states.items():
                held.append(Held(name, spec.shape, spec.dtype, coordinate, state))
                origin.append((number, Key(holder, state)))
                own += name == holder
        return cls(tuple(held), tuple(origin), own)


def bind_tied(
    parts: Sequence[Part], program: Program, bind: Bind, flags: Mapping[str, bool] | None
) -> tuple[Bound, Shards]:
    """Bind the tensors of `parts`. What the source ties is tied in the result too, where a rule names the alias.

    A program that wants a tensor under an alias gets it so; else an alias need not be mentioned. Where names do not
    tell whether a `tie` of the program holds, a source that is whole does: by whether it has ties itself.
    """
    given = flags or {}
    told = _tie_flags(program, tied=any(catalog.ties for _, catalog in parts)) if len(parts) == 1 else {}
    try:
        return _bind(parts, bind, given)
    except FitError as error:
        if told.keys() <= given.keys():
            raise
        try:
            return _bind(parts, bind, {**told, **given})
        except FitError:
            raise error from None


def _tie_flags(program: Program, *, tied: bool) -> dict[str, bool]:
    """The flags that the program's ties depend on, as they are if the source ties tensors or does not."""
    ties = [statement for statement in program.statements if isinstance(statement, Tie)]
    return {c.flag: c.wanted is tied for tie in ties for c in tie.conditions}


def _bind(parts: Sequence[Part], bind: Bind, flags: Mapping[str, bool]) -> tuple[Bound, Shards]:
    shards = Shards.of(parts)
    if not any(catalog.ties for _, catalog in parts):
        return bind(shards.held, flags), shards
    aliased = Shards.of(parts, aliases=True)
    try:
        bound = bind(shards.held, flags)
    except FitError as error:
        try:
            bound = bind(aliased.held, flags)
        except FitError:
            raise error from None
        return _without_copies(bound, aliased), aliased
    try:
        both = bind(aliased.held, bound.flags)
    except FitError:
        return bound, shards
    known = {name for name, _ in bound.tensors}
    found = {a: name for a, name in _copies(both, aliased).items() if a not in known and name in known}
    return replace(bound, ties={**found, **bound.ties}), shards


def _without_copies(bound: Bound, shards: Shards) -> Bound:
    copies = _copies(bound, shards)
    return replace(
        bound,
        tensors={key: tensor for key, tensor in bound.tensors.items() if key[0] not in copies},
        pieces={key: pieces for key, pieces in bound.pieces.items() if key[0] not in copies},
        ties={**copies, **bound.ties},
    )


def _copies(bound: Bound, shards: Shards) -> dict[str, str]:
    """Logical tensors made of aliases alone, with the tensor that is made of the same elements."""
    made: dict[object, str] = {}
    aliases: dict[str, object] = {}
    for (name, state), pieces in bound.pieces.items():
        if state == "value":
            elements = frozenset((shards.origin[piece.held], piece.block) for piece in pieces)
            if all(piece.held >= shards.own for piece in pieces):
                aliases[name] = elements
            else:
                made.setdefault(elements, name)
    return {alias: made[elements] for alias, elements in aliases.items() if elements in made}
