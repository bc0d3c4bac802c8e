"""How optimizer states lie, from their shapes beside those of the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp.lang.ast import State, Statement
from ucp.lang.held import Held
from ucp.layout import Shape
from ucp.layout.expr import Layout


@dataclass(frozen=True, slots=True)
class States:
    """What a program says of states. `odd` are tensors with a state of a shape that no statement gives: its name."""

    statements: tuple[Statement, ...]
    odd: Mapping[str, str]


def states(held: Sequence[Held]) -> States:
    """Statements for all states but ``value``."""
    shapes = {(s.name, tuple(sorted(s.coordinate.items()))): s.shape for s in held if s.state == "value"}
    pairs: dict[str, list[tuple[str, Shape | None, Shape]]] = {}
    for shard in held:
        if shard.state != "value":
            key = (shard.name, tuple(sorted(shard.coordinate.items())))
            pairs.setdefault(shard.state, []).append((shard.name, shapes.get(key), shard.shape))
    own: list[Statement] = []
    odd: dict[str, str] = {}
    for state, found in pairs.items():
        statement = _statement(state, [(value, shape) for _, value, shape in found])
        if statement is None:
            odd |= {name: state for name, value, shape in found if value is not None and value != shape}
        else:
            own.append(statement)
    return States((*own, *([State(("*",))] if len(own) < len(pairs) else [])), odd)


def _statement(state: str, found: Sequence[tuple[Shape | None, Shape]]) -> State | None:
    """A statement of its own for a state that does not lie like its tensor, if there is one."""
    if all(value is None or value == shape for value, shape in found):
        return None
    if all(shape == () for _, shape in found):
        return State((state,), Layout(()))
    for lacking in (-1, -2):
        if all(value is not None and _without(value, lacking) == shape for value, shape in found):
            return State((state,), lacking=(lacking,))
    return None


def _without(shape: Shape, dim: int) -> Shape | None:
    if len(shape) < -dim:
        return None
    gone = len(shape) + dim
    return (*shape[:gone], *shape[gone + 1 :])
