"""What of a source's training state ``torch.load(weights_only=True)`` takes, and what is left out.

torch/_weights_only_unpickler.py, ``_get_allowed_globals``: plain values, tensors, dtypes, and few classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ucp.container.leaves import leaf_bytes
from ucp.container.torchwrite import Slot
from ucp.container.values import Reference
from ucp.layout import Box
from ucp.plan import Cover, Fragment, Key, TensorSpec
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

_INLINE_BYTES = 1 << 20
_CLASSES = frozenset(
    f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")
)


class _NotPlainError(Exception):
    """Something inside would be refused; why."""


class Plain:
    """Makes trees plain. Large tensors become slots by way of `slot`, small ones hold their bytes.

    `left_out` collects remarks on what is not taken over: the smallest dict entry around it goes, so that positions in
    lists and tuples never move.
    """

    classes = _CLASSES

    def __init__(self, store: Store, slot: Callable[[Cover], Slot]) -> None:
        self.left_out: list[str] = []
        self._store = store
        self._slot = slot

    def entries(self, tree: Mapping[Any, Tree], where: str) -> dict[Any, Tree]:
        """The entries of a dict that can be taken over; `where` is put before their names in remarks."""
        found: dict[Any, Tree] = OrderedDict() if isinstance(tree, OrderedDict) else {}
        for key, value in tree.items():
            path = f"{where}{key}"
            try:
                # A dict inside is looked at entry by entry.
                _check((key,) if isinstance(value, Mapping) else (key, value))
            except _NotPlainError as error:
                self.left_out.append(f"left out, torch.load(weights_only=True) would refuse it: {path} ({error})")
                continue
            found[key] = self._taken(value, path)
        return found

    def _taken(self, node: Tree, path: str) -> Tree:
        if isinstance(node, Mapping):
            return self.entries(node, f"{path}.")
        if isinstance(node, TensorLeaf):
            return self._tensor(node, path)
        if isinstance(node, list):
            return [self._taken(item, f"{path}.{i}") for i, item in enumerate(node)]
        if isinstance(node, tuple):
            return type(node)(self._taken(item, f"{path}.{i}") for i, item in enumerate(node))
        return node

    def _tensor(self, leaf: TensorLeaf, path: str) -> Tree:
        extent = leaf.extent
        if leaf.inline is not None:
            return leaf
        if extent.nbytes <= _INLINE_BYTES:
            return replace(leaf, inline=leaf_bytes(self._store, leaf))
        spec = TensorSpec(extent.shape, extent.dtype)
        return self._slot(Cover.of(Key(path, "state"), spec, (Fragment(Box.whole(extent.shape), extent),)))


def _check(node: Tree) -> None:
    """_NotPlainError unless all of `node` can be taken over."""
    if isinstance(node, TensorLeaf):
        if node.numpy:
            raise _NotPlainError("a NumPy array")
    elif isinstance(node, Reference):
        if node.path not in _CLASSES:
            raise _NotPlainError(f"names {node.path}")
    elif isinstance(node, Opaque):
        raise _NotPlainError(f"an object of class {node.path}")
    elif isinstance(node, frozenset):
        raise _NotPlainError("a frozenset")
    elif isinstance(node, Mapping):
        for key, value in node.items():
            _check(key)
            _check(value)
    elif isinstance(node, list | tuple | set):
        for item in node:
            _check(item)
