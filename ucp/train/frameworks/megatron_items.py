"""Training state of Megatron-Core that is no tensor: schedules, loss scales, objects of ranks, arguments.

Stored under the names that all frameworks share (`ucp.training`): ``lr_scheduler`` and ``loss_scale``.
"""

from __future__ import annotations

import copy
import io
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ucp.catalog import Catalog
from ucp.container.values import Reference
from ucp.errors import FitError
from ucp.lazy import read_tree
from ucp.train.items import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.tree import Opaque, Tree, walk

OWN_ARGUMENTS = ("rank", "local_rank")
"""Arguments that each rank has of its own."""


@dataclass(frozen=True, slots=True)
class Schedule(Item):
    """``OptimizerParamScheduler`` (megatron/core/optimizer_param_scheduler.py). Another framework's is left alone."""

    scheduler: Any
    name: str = "lr_scheduler"

    def saved(self) -> Tree:
        return tree_of(self.scheduler.state_dict(), self.name)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        own = self.scheduler.state_dict()
        if not isinstance(stored, Mapping) or not own.keys() <= stored.keys():
            return Prepared(None, f"{self.name}: is another framework's, and the job keeps its own")
        state = read_tree(stored)
        twin = copy.copy(self.scheduler)
        twin.optimizer = SimpleNamespace(param_groups=[dict(group) for group in self.scheduler.optimizer.param_groups])
        try:
            _set_schedule(twin, state)
        except AssertionError as error:
            hint = "start with --override-opt_param-scheduler or --use-checkpoint-opt_param-scheduler"
            raise FitError(f"{self.name}: {error}", hint=hint) from error
        return Prepared(state)

    def install(self, state: Any) -> None:
        if state is not None:
            _set_schedule(self.scheduler, state)


def _set_schedule(scheduler: Any, state: Any) -> None:
    # It adds the steps that it is given to those that it has made.
    scheduler.num_steps = 0
    scheduler.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class LossScale(Item):
    """Gradient scalers of Megatron-Core, one in each of its optimizers and all alike (optimizer/grad_scaler.py)."""

    scalers: Sequence[Any]
    name: str = "loss_scale"

    def saved(self) -> Tree:
        found = [{**scaler.state_dict(), "scale": float(scaler.scale)} for scaler in self.scalers]
        if any(one != found[0] for one in found):
            raise FitError("the optimizers have different loss scales")
        return tree_of(found[0], self.name)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        told = read_tree(stored) if isinstance(stored, Mapping) else {}
        if not isinstance(told.get("scale"), int | float):
            raise FitError(f"{self.name}: the source has no scale in it", hint="was its scaler enabled?")
        own = self.scalers[0].state_dict()
        if not own:
            return Prepared(None, f"{self.name}: the job's is constant, and stays as it is")
        kept = sorted(own.keys() - told.keys())
        note = f"{self.name} keeps its own {', '.join(kept)}: the source has none" if kept else None
        return Prepared({key: told[key] for key in own.keys() & told.keys()}, note)

    def install(self, state: Any) -> None:
        for scaler in self.scalers if state else ():
            own = scaler.state_dict()
            scale = torch.full_like(own["scale"], state["scale"])
            scaler.load_state_dict({**own, **state, "scale": scale})


@dataclass(frozen=True, slots=True)
class Sharded:
    """An object that ranks hold a part of each: `key` says which, and `put` sets it."""

    key: str
    value: Any
    main: bool
    put: Callable[[Any], None] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Objects(Item):
    """``ShardedObject``s (megatron/core/dist_checkpointing/mapping.py): random states, extra states of layers.

    Each is found by its key, which says of how many it is which; of another number of ranks there is none, and the
    job's own stays.
    """

    objects: Sequence[Sharded]
    name: str = "sharded_objects"
    per_rank: ClassVar[bool] = True

    def saved(self) -> Tree:
        return {one.key: _object(one.value, one.key) for one in self.objects if one.main and one.value is not None}

    def told(self, catalog: Catalog) -> Tree:
        return catalog.state.get(self.name, {})

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        known = {key: value for held in stored.values() for key, value in held.items()}
        ready, absent = [], []
        for one in self.objects:
            if one.key in known:
                ready.append((one, _live(known[one.key], one.key)))
            elif one.value is not None:
                absent.append(one.key)
        note = f"objects of other ranks than the source's stay as they are: {', '.join(absent[:3])}" if absent else None
        return Prepared(ready, note)

    def install(self, state: Any) -> None:
        for one, value in state:
            one.put(value)


def _object(value: Any, where: str) -> Tree:
    if isinstance(value, io.BytesIO):
        return Opaque("io", "BytesIO", args=(value.getvalue(),))
    return tree_of(value, where)


def _live(stored: Tree, where: str) -> Any:
    if isinstance(stored, Opaque) and stored.path == "io.BytesIO" and stored.args:
        return io.BytesIO(stored.args[0])
    for path, node in walk(stored, where=where):
        if isinstance(node, Opaque):
            raise FitError(f"{where}: {path} is a {node.path}, which is never built")
    return read_tree(stored)


@dataclass(frozen=True, slots=True)
class Arguments(Item):
    """Megatron-LM's arguments, without what each rank has of its own; stored as a dict, classes by name."""

    args: Namespace
    holder: Any
    key: Any
    name: str = "args"

    def saved(self) -> Tree:
        return {name: _argument(value) for name, value in vars(self.args).items() if name not in OWN_ARGUMENTS}

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        if not isinstance(stored, Mapping):
            raise FitError(f"{self.name}: is no dict of arguments in the source")
        told = {name: value for name, value in stored.items() if not isinstance(value, Opaque)}
        return Prepared(Namespace(**{**vars(self.args), **read_tree(told)}))

    def install(self, state: Any) -> None:
        self.holder[self.key] = state


def _argument(value: Any) -> Tree:
    if isinstance(value, torch.dtype):
        return Reference("torch", str(value).removeprefix("torch."))
    if isinstance(value, Enum):
        return Reference(type(value).__module__, f"{type(value).__name__}.{value.name}")
    try:
        return tree_of(value, "args")
    except FitError:
        return Reference(type(value).__module__, type(value).__qualname__)


@dataclass(frozen=True, slots=True)
class Rest(Item):
    """What a dict of `sharded_state_dict()` has beside sharded parts: (path, value, what holds it), by its path."""

    root: Any
    parts: Sequence[tuple[tuple[Any, ...], Any, Any]]
    name: str = "megatron"

    def saved(self) -> Tree:
        return [[list(path), tree_of(value, ".".join(map(str, path)))] for path, value, _ in self.parts]

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        parts = read_tree(stored)
        if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
            raise FitError(f"{self.name}: is no list of paths and values in the source")
        return Prepared([(tuple(path), value) for path, value in parts])

    def install(self, state: Any) -> None:
        for path, value in state:
            _put(self.root, path, value)


def _put(holder: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set what lies at `path`, in new dicts where there are none yet."""
    for key in path[:-1]:
        if isinstance(holder, dict):
            holder = holder.setdefault(key, {})
        elif key < len(holder):
            holder = holder[key]
        else:
            holder.append({})
            holder = holder[-1]
    if isinstance(holder, list) and path[-1] == len(holder):
        holder.append(value)
    else:
        holder[path[-1]] = value
