"""Which nodes get a copy of what a node writes, and which look after others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def buddies(writer: str, nodes: Sequence[str], copies: int) -> tuple[str, ...]:
    """The other nodes that get what `writer` writes, so that `copies` nodes have it, or all where there are fewer.

    They are those that follow it in a ring of all nodes, by name: every node keeps as much as any other, and who has
    what follows from the names alone.
    """
    ring = sorted({*nodes, writer})
    at = ring.index(writer)
    return tuple(ring[(at + step) % len(ring)] for step in range(1, min(copies, len(ring))))


def wards(me: str, nodes: Iterable[str], active: Iterable[str]) -> tuple[str, ...]:
    """Of `nodes` those that are not `active` and in whose folders `me`, which is, does what nobody there does."""
    able = sorted(set(active))
    idle = sorted(set(nodes).difference(able))
    return tuple(node for at, node in enumerate(idle) if able[at % len(able)] == me)
