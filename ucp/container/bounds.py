"""A check that a tree is one: finite, not too deep, and not a few shared nodes that unfold to billions."""

from __future__ import annotations

from collections.abc import Iterable

from ucp.errors import CorruptError
from ucp.tree import Opaque, Tree

MOST_NODES = 5_000_000
MOST_DEPTH = 200

_CONTAINERS = (dict, list, tuple, set, frozenset, Opaque)


def check_bounds(root: Tree, *, where: str, most: int = MOST_NODES) -> None:
    """CorruptError naming `where` for a tree with cycles, too deep for `ucp.tree.walk`, or of more than `most` nodes.

    Time is linear in the number of distinct nodes, however many times they are shared.
    """
    done: dict[int, tuple[int, int]] = {}
    above: set[int] = set()
    stack = [root] if isinstance(root, _CONTAINERS) else []
    while stack:
        node = stack[-1]
        key = id(node)
        if key in done:
            stack.pop()
        elif key in above:
            done[key] = _measure(node, done, where, most)
            above.discard(key)
            stack.pop()
        else:
            above.add(key)
            waiting = [part for part in _parts(node) if isinstance(part, _CONTAINERS) and id(part) not in done]
            if not above.isdisjoint(map(id, waiting)):
                raise _outsized(where)
            stack.extend(waiting)


def _measure(node: Tree, done: dict[int, tuple[int, int]], where: str, most: int) -> tuple[int, int]:
    """(nodes, depth) of the tree below `node`, whose containers are done."""
    nodes, depth = 1, 0
    for part in _parts(node):
        more, deeper = done.get(id(part), (1, 0)) if isinstance(part, _CONTAINERS) else (1, 0)
        nodes += more
        depth = max(depth, deeper + 1)
    if nodes > most or depth > MOST_DEPTH:
        raise _outsized(where)
    return nodes, depth


def _parts(node: Tree) -> Iterable[Tree]:
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, Opaque):
        return (*node.args, *node.kwargs.values(), node.state, *node.items, *node.pairs)
    parts: Iterable[Tree] = node
    return parts


def _outsized(where: str) -> CorruptError:
    return CorruptError(f"{where}: nested too deeply or too large to be training state", hint="do not trust this file")
