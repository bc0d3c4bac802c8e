"""Training state as inert data: plain Python values, tensors that were not read, and objects that were not built.

Whatever a framework pickled beside its tensors (schedulers, RNG, client state) is held as a tree of dict, list, tuple,
set, str, bytes, numbers, None and the leaves below. Nothing in a tree ever ran code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import CorruptError
from ucp.plan import Extent

Tree = Any
"""dict | list | tuple | set | frozenset | str | bytes | int | float | complex | bool | None | TensorLeaf | Opaque"""

_MOST_NODES = 5_000_000
_MOST_DEPTH = 200


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """A tensor inside a tree: where its bytes lie. `numpy` says that it was a numpy array and not a torch tensor.

    `inline` holds the bytes themselves (C order, little-endian) where they are part of the tree and `extent` only gives
    shape and dtype.
    """

    extent: Extent
    numpy: bool = False
    inline: bytes | None = None


@dataclass(slots=True)
class Opaque:
    """An object of a class that was named but never imported.

    `module` and `name` say which; `args` and `kwargs` are what its constructor would have been called with, `state`
    what it would have been given after, `items` and `pairs` what would have been appended or set on it.
    """

    module: str
    name: str
    args: tuple[Tree, ...] = ()
    kwargs: dict[str, Tree] = field(default_factory=dict)
    state: Tree = None
    items: list[Tree] = field(default_factory=list)
    pairs: list[tuple[Tree, Tree]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"

    def attribute(self, name: str, default: Tree = None) -> Tree:
        """Value of one entry of its ``__dict__`` state."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __hash__(self) -> int:
        return id(self)


def children(node: Tree) -> Iterator[tuple[str, Tree]]:
    """(path component, child) of a container node; nothing for a leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key), value
    elif isinstance(node, list | tuple | set | frozenset):
        for index, value in enumerate(node):
            yield str(index), value
    elif isinstance(node, Opaque):
        parts: tuple[Tree, ...] = (*node.args, *node.kwargs.values(), node.state, *node.items, *node.pairs)
        for index, value in enumerate(parts):
            yield f"<{node.name}>{index}", value


def walk(root: Tree, *, where: str = "state") -> Iterator[tuple[str, Tree]]:
    """Every (dotted path, node) of a tree, parents first.

    CorruptError naming `where` for a tree too deep or with too many nodes: a pickle of a few bytes can describe one
    that would take forever to walk.
    """
    stack: list[tuple[str, Tree, int]] = [("", root, 0)]
    count = 0
    while stack:
        path, node, depth = stack.pop()
        count += 1
        if count > _MOST_NODES or depth > _MOST_DEPTH:
            raise CorruptError(
                f"{where}: nested too deeply or too large to be training state", hint="do not trust this file"
            )
        yield path, node
        parts = [(f"{path}.{name}" if path else name, child, depth + 1) for name, child in children(node)]
        stack.extend(reversed(parts))
