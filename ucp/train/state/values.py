"""Plain values: counters, names, lists of numbers, kept in whatever mutable thing holds them."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any

from ucp.errors import FitError, UsageError
from ucp.lazy import read_tree
from ucp.train.state.item import Item, Prepared, World
from ucp.train.state.live import tree_of
from ucp.tree import Opaque, Tree, walk

Holder = MutableMapping[Any, Any] | MutableSequence[Any]


@dataclass(frozen=True, slots=True)
class Value(Item):
    """``holder[key]``, or `fixed` where nothing holds it: a dict or list is filled in place, a number only saved.

    Dicts and lists are refilled, so that whoever else has them sees what was loaded.
    """

    name: str
    fixed: Any = None
    holder: Holder | None = None
    key: Any = None

    @property
    def value(self) -> Any:
        """What it is now."""
        return self.fixed if self.holder is None else self.holder[self.key]

    def saved(self) -> Tree:
        return tree_of(self.value, self.name)

    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        refuse_objects(stored, self.name)
        state = read_tree(stored)
        if self.holder is None and not _refill(self.value, state, dry=True):
            told = f"a {type(self.value).__name__} that nothing holds cannot become a {type(state).__name__}"
            raise UsageError(f"{self.name}: {told}", hint="put it into a dict")
        return Prepared(state)

    def install(self, state: Any) -> None:
        if not _refill(self.value, state) and self.holder is not None:
            self.holder[self.key] = state


def _refill(value: Any, state: Any, *, dry: bool = False) -> bool:
    """Put `state` into the container `value`; whether that is possible."""
    if isinstance(value, dict) and isinstance(state, dict):
        if not dry:
            value.clear()
            value.update(state)
        return True
    if isinstance(value, list) and isinstance(state, list):
        if not dry:
            value[:] = state
        return True
    return False


def refuse_objects(stored: Tree, name: str) -> None:
    """FitError where a tree holds objects of classes, which are never built."""
    opaque = [f"{path or name} ({node.path})" for path, node in walk(stored, where=name) if isinstance(node, Opaque)]
    if opaque:
        raise FitError(f"{name}: holds objects that are never built: {', '.join(opaque[:3])}")
