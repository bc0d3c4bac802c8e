"""Objects with ``state_dict`` and ``load_state_dict``: schedulers, gradient scalers, and whatever else has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ucp.catalog import Catalog
from ucp.errors import FitError
from ucp.lazy import read_tree
from ucp.train.state.item import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.train.state.values import refuse_objects
from ucp.training import progress
from ucp.tree import Tree


@dataclass(frozen=True, slots=True)
class Stateful(Item):
    """An object whose state is the same on all ranks, such as a counter or an early-stopping rule."""

    name: str
    object: Any

    def saved(self) -> Tree:
        return tree_of(self.object.state_dict(), self.name)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        refuse_objects(stored, self.name)
        return Prepared(read_tree(stored))

    def install(self, state: Any) -> None:
        self.object.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class Scheduler(Stateful):
    """A learning-rate scheduler; what it keeps per group of its optimizer is put in order before `install`."""


@dataclass(frozen=True, slots=True)
class Scaler(Stateful):
    """``torch.amp.GradScaler``. Of another framework's loss scale, what it does not tell stays the scaler's own."""

    def told(self, catalog: Catalog) -> Tree:
        scale = progress(catalog).loss_scale if self.name == "loss_scale" else None
        return super(Scaler, self).told(catalog) if scale is None else scale

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        refuse_objects(stored, self.name)
        own = self.object.state_dict()
        if not own:
            return Prepared({}, f"{self.name}: the scaler is not enabled, and stays as it is")
        told = read_tree(stored)
        if not isinstance(told, Mapping) or not isinstance(told.get("scale"), int | float):
            raise FitError(f"{self.name}: the source has no scale in it", hint="was its scaler enabled?")
        known = {key: type(value)(told[key]) for key, value in own.items() if key in told}
        kept = sorted(own.keys() - known.keys())
        note = f"{self.name} keeps its own {', '.join(kept)}: the source has none" if kept else None
        return Prepared({**own, **known}, note)

    def install(self, state: Any) -> None:
        if state:
            self.object.load_state_dict(state)


def is_stateful(value: Any) -> bool:
    """Whether it can tell and take its state."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def is_scheduler(value: Any) -> bool:
    """Whether it is a learning-rate scheduler, of torch or made like one."""
    return is_stateful(value) and callable(getattr(value, "get_last_lr", None))


def is_scaler(value: Any) -> bool:
    """Whether it is a gradient scaler of torch, sharded ones among them."""
    return isinstance(value, torch.amp.GradScaler)
