"""Objects whose state is each rank's own: kept by rank, and merged and split again where the ranks changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ucp.errors import FitError, UsageError
from ucp.lazy import read_tree
from ucp.train.state.item import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.train.state.stateful import is_stateful
from ucp.train.state.values import refuse_objects
from ucp.tree import Tree

Merge = Callable[[Sequence[Any]], Any]
"""From the states of all ranks, in their order, to one."""

Split = Callable[[Any, int, int], Any]
"""From one state, a rank and the number of ranks to the state of that rank."""


@dataclass(frozen=True, slots=True)
class PerRank:
    """Declares that `object`, which has ``state_dict`` and ``load_state_dict``, has a state of its own on each rank.

    On the layout that saved it each rank gets its own back. On another one, ``merge(states)`` makes one state of those
    of all ranks, in rank order, and ``split(state, rank, size)`` that of each rank; without `split` every rank gets the
    merged one. Without `merge` such a load is a FitError.

    >>> counts = PerRank(seen, merge=lambda states: {"seen": sum(s["seen"] for s in states)},     # doctest: +SKIP
    ...                  split=lambda state, rank, size: {"seen": state["seen"] if rank == 0 else 0})
    """

    object: Any
    merge: Merge | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        if not is_stateful(self.object):
            raise UsageError(
                f"PerRank: a {type(self.object).__name__} has no state_dict() and load_state_dict()",
                hint="give the object both methods",
            )
        if self.split is not None and self.merge is None:
            raise UsageError("PerRank: split without merge", hint="merge makes the state that split divides")


@dataclass(frozen=True, slots=True)
class Own(Item):
    """What a `PerRank` declares, under its name."""

    name: str
    declared: PerRank
    remedy: str = "ucp.PerRank(object, merge=..., split=...) says what becomes of it"
    per_rank: ClassVar[bool] = True

    def saved(self) -> Tree:
        return tree_of(self.declared.object.state_dict(), self.name)

    def prepare(self, stored: Mapping[int, Tree], *, world: World) -> Prepared:
        refuse_objects(dict(stored), self.name)
        world = world.beside(stored)
        if world.same_layout:
            if world.rank not in stored:
                raise FitError(f"{self.name}: the source has none of rank {world.rank}")
            return Prepared(read_tree(stored[world.rank]))
        if self.declared.merge is None:
            raise FitError(
                f"{self.name}: has a state on each of {len(stored)} ranks, which are not the ranks that load",
                hint=self.remedy,
            )
        state = self.declared.merge([read_tree(stored[rank]) for rank in sorted(stored)])
        if self.declared.split is not None:
            state = self.declared.split(state, world.rank, world.size)
        return Prepared(state, f"{self.name}: merged from {len(stored)} ranks and split over {world.size}")

    def install(self, state: Any) -> None:
        self.declared.object.load_state_dict(state)
