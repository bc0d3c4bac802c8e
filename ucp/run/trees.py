"""Comparison of training state: two trees, the tensors in them read from their stores and compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ucp.plan import Copy, Extent
from ucp.run.cast import Array
from ucp.run.gather import gather
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree, children


def differences(a: Tree, b: Tree, *, stores: tuple[Store, Store]) -> Iterator[tuple[str, str]]:
    """(dotted path, what differs) for every difference of two trees. Types count: a list is no tuple and 1 no 1.0.

    Raises what reading a tensor raises.
    """
    stack: list[tuple[str, Tree, Tree]] = [("", a, b)]
    while stack:
        path, one, two = stack.pop()
        difference = _difference(one, two, stores)
        if difference:
            yield path, difference
        elif not isinstance(one, set | frozenset):
            below = [(f"{path}.{name}" if path else name, mine, theirs) for name, mine, theirs in _pairs(one, two)]
            stack.extend(reversed(below))


def _pairs(a: Tree, b: Tree) -> Iterator[tuple[str, Tree, Tree]]:
    """(name, child, child) of two nodes that are alike; dicts by key, however they were filled."""
    if isinstance(a, dict):
        yield from ((str(key), value, b[key]) for key, value in a.items())
    else:
        yield from ((name, mine, theirs) for (name, mine), (_, theirs) in zip(children(a), children(b), strict=True))


def _difference(a: Tree, b: Tree, stores: tuple[Store, Store]) -> str | None:
    """How two nodes differ, their children not counted; None where they do not."""
    if type(a) is not type(b):
        return f"{_shown(a)} against {_shown(b)}"
    if isinstance(a, dict):
        return _only("keys", a, b)
    if isinstance(a, set | frozenset):
        return _only("members", a, b)
    if isinstance(a, list | tuple):
        return None if len(a) == len(b) else f"{len(a)} against {len(b)} items"
    if isinstance(a, Opaque):
        forms = [(o.path, len(o.args), list(o.kwargs), len(o.items), len(o.pairs)) for o in (a, b)]
        return None if forms[0] == forms[1] else f"{_shown(a)} against {_shown(b)}"
    if isinstance(a, TensorLeaf):
        return _tensors(a, b, stores)
    both_nan = isinstance(a, float | complex) and a != a and b != b
    return None if a == b or both_nan else f"{_shown(a)} against {_shown(b)}"


def _only(what: str, a: Any, b: Any) -> str | None:
    first, second = (sorted(map(repr, side)) for side in (set(a) - set(b), set(b) - set(a)))
    parts = [
        f"{what} only in the {side}: {' '.join(found)[:120]}"
        for side, found in (("first", first), ("second", second))
        if found
    ]
    return ", ".join(parts) or None


def _tensors(a: TensorLeaf, b: TensorLeaf, stores: tuple[Store, Store]) -> str | None:
    forms = [(leaf.extent.dtype, list(leaf.extent.shape), leaf.numpy) for leaf in (a, b)]
    if forms[0] != forms[1]:
        return f"{_shown(a)} against {_shown(b)}"
    return None if np.array_equal(_bytes(a, stores[0]), _bytes(b, stores[1])) else f"{_shown(a)}: values differ"


def _bytes(leaf: TensorLeaf, store: Store) -> Array:
    """The leaf's elements as C-order bytes."""
    if leaf.inline is not None:
        return np.frombuffer(leaf.inline, np.uint8)
    buffer = np.empty(leaf.extent.nbytes, np.uint8)
    target = Extent.contiguous("", 0, leaf.extent.shape, leaf.extent.dtype)
    gather(store, [Copy(leaf.extent, target)], buffer.data)
    return buffer


def _shown(node: Tree) -> str:
    if isinstance(node, TensorLeaf):
        return f"{'array' if node.numpy else 'tensor'} {node.extent.dtype}{list(node.extent.shape)}"
    if isinstance(node, Opaque):
        return f"<{node.path}>"
    if isinstance(node, dict | list | tuple | set | frozenset):
        return f"{type(node).__name__} of {len(node)}"
    text = repr(node)
    return text if len(text) <= 40 else f"{text[:39]}…"
