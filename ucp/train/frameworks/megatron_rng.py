"""Random streams of Megatron-Core's tracker, from which model-parallel ranks draw."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ucp.errors import FitError
from ucp.lazy import read_tree
from ucp.train.items import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.train.state.streams import chosen
from ucp.tree import Tree


@dataclass(frozen=True, slots=True)
class Tracker(Item):
    """``CudaRNGStatesTracker`` (megatron/core/tensor_parallel/random.py), each of its streams as those of `ucp.Rng`.

    On the layout that saved them ranks go on with their own. On another one a stream that all ranks shared goes on, one
    that differed along axes that kept their sizes goes on by the coordinate there, and any other starts anew, from a
    seed made of the saved streams and the coordinate: ranks that drew alike do so still, others differ, and nothing
    that was drawn since the job's first step comes again. Where meshes do not compare, as those that spread experts
    differently do not, such a stream stays as ``model_parallel_cuda_manual_seed`` made it.
    """

    tracker: Any
    name: str = "rng_tracker"
    per_rank: ClassVar[bool] = True

    def saved(self) -> Tree:
        return tree_of(self.tracker.get_states(), self.name)

    def prepare(self, stored: Mapping[int, Tree], *, world: World) -> Prepared:
        ranks = {rank: read_tree(tree) for rank, tree in stored.items()}
        if not all(isinstance(tree, dict) for tree in ranks.values()):
            raise FitError(f"{self.name}: is no dict of random streams in the source")
        own, world = self.tracker.get_states(), world.beside(stored)
        states: dict[str, Any] = {}
        told: dict[str, list[str]] = {}
        for name in own:
            held = {rank: tree[name] for rank, tree in ranks.items() if tree.get(name) is not None}
            if not held:
                told.setdefault("not in the source, as it was seeded", []).append(name)
                continue
            choice = chosen(name, held, world)
            why = choice.told
            if choice.seed is None:
                states[name] = choice.state
            elif _comparable(world):
                states[name] = self._seeded(name, choice.seed)
            else:
                why = "as it was seeded, on a layout that is another one"
            if why:
                told.setdefault(why, []).append(name)
        notes = [f"{', '.join(names)}: {what}" for what, names in told.items()]
        return Prepared({**own, **states}, f"{self.name}: {'; '.join(notes)}" if notes else None)

    def _seeded(self, name: str, seed: int) -> Any:
        twin = copy.copy(self.tracker)
        twin.reset()
        twin.add(name, seed)
        return twin.get_states()[name]

    def install(self, state: Any) -> None:
        self.tracker.set_states(state)


def _comparable(world: World) -> bool:
    """Whether both layouts have the same axes, of whatever sizes."""
    if world.mesh is None or world.saved_mesh is None:
        return False
    return {axis for axis, _ in world.mesh.axes} == {axis for axis, _ in world.saved_mesh.axes}
