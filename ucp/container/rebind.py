"""One tree for several files that hold the same pickle: only where tensors lie differs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ucp.container.values import Reference
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf, Tree


class Rebind:
    """Moves leaves from the storages of one object to those of another, `path`; byte offsets by storage name."""

    def __init__(self, path: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        self._path = path
        order = sorted(before, key=lambda name: before[name])
        self._starts = [before[name] for name in order]
        self._shifts = [after[name] - before[name] for name in order]
        self._done: dict[int, Tree] = {}

    def tree(self, node: Tree) -> Tree:
        """`node` with its leaves moved. Parts without any are the very same objects; so are leaves of no bytes."""
        if isinstance(node, TensorLeaf):
            return self._leaf(node)
        if not isinstance(node, dict | list | tuple | set | frozenset | Opaque) or isinstance(node, Reference):
            return node
        if id(node) not in self._done:
            self._done[id(node)] = self._container(node)
        return self._done[id(node)]

    def _container(self, node: Any) -> Tree:
        if isinstance(node, dict):
            moved = [(self.tree(key), self.tree(value)) for key, value in node.items()]
            same = zip(moved, node.items(), strict=True)
            return node if all(a[0] is b[0] and a[1] is b[1] for a, b in same) else dict(moved)
        if isinstance(node, Opaque):
            parts = {name: getattr(node, name) for name in ("args", "kwargs", "state", "items", "pairs")}
            changed = {name: self.tree(part) for name, part in parts.items()}
            return node if all(changed[name] is parts[name] for name in parts) else replace(node, **changed)
        items = [self.tree(item) for item in node]
        if all(a is b for a, b in zip(items, node, strict=True)):
            return node
        return items if isinstance(node, list) else type(node)(items)

    def _leaf(self, leaf: TensorLeaf) -> TensorLeaf:
        extent = leaf.extent
        if leaf.inline is not None or not extent.size:
            return leaf
        shift = self._shifts[bisect_right(self._starts, extent.offset) - 1]
        moved = Extent(self._path, extent.offset + shift, extent.shape, extent.strides, extent.dtype)
        return TensorLeaf(moved, leaf.numpy)
