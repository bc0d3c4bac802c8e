"""Records of a framework's own, which ranks may keep a little differently: rank 0's are kept, all go on with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import distributed

from ucp.lazy import read_tree
from ucp.train.items import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.tree import Tree


@dataclass(frozen=True, slots=True)
class Lead(Item):
    """An object with ``state_dict`` and ``load_state_dict``; the latter gets what the former gave on rank 0."""

    name: str
    object: Any
    per_rank: ClassVar[bool] = True

    def saved(self) -> Tree:
        # All ranks ask: a framework's hooks may speak with each other.
        state = self.object.state_dict()
        return tree_of(state, self.name) if _first() else {}

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        return Prepared(read_tree(stored[0]))

    def install(self, state: Any) -> None:
        self.object.load_state_dict(state)


def told_by_rank_0(state: Any) -> Any:
    """What `Lead` kept, from `Checkpoint.read_state`."""
    return state["rank"]["0"]


def _first() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
