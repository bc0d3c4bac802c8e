"""Copies in place of those that were lost with nodes: until then the loss of another node could be one too many."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from ucp.elastic.nodes.member import Member
from ucp.elastic.nodes.placement import buddies
from ucp.errors import NotFoundError, StorageError
from ucp.store import Entry

_LOG = logging.getLogger("ucp")
_PIECE_BYTES = 1 << 20


class Nodes(Protocol):
    """What there is of a `NodesStore`."""

    nodes: tuple[str, ...]
    copies: int
    active: tuple[str, ...]
    tended: tuple[str, ...]
    members: dict[str, Member]


def heal(store: Nodes, listing: Mapping[str, Mapping[str, Entry]]) -> int:
    """Copy what this node is to copy of `listing`, by full path, and return the bytes.

    Of the nodes that have an object the first active one, by name, makes the copies that are too few; who tends the
    first one, where none is active. What is removed meanwhile is passed over, as is a node that is gone.
    """
    return sum(_heal(store, path, held) for path, held in sorted(listing.items()))


def _heal(store: Nodes, path: str, held: Mapping[str, Entry]) -> int:
    best = max(held.values(), key=lambda entry: (entry.size, entry.fingerprint)).fingerprint
    holders = [node for node, entry in held.items() if entry.fingerprint == best]
    source = min(holders, key=lambda node: (node not in store.active, node))
    lacking, copied = store.copies - len(holders), 0
    others = buddies(source, store.nodes, len(store.nodes)) if source in store.tended else ()
    for node in (node for node in others if node not in holders):
        if lacking <= 0:
            break
        try:
            copied += _copy(store.members[source], store.members[node], path)
            lacking -= 1
        except NotFoundError:
            break
        except StorageError as error:
            _LOG.warning("%s: not copied to node %s: %s", path, node, error)
    return copied


def _copy(source: Member, target: Member, path: str) -> int:
    entry = source.entry(path)
    stamp = int(entry.fingerprint.rpartition("-")[2])
    buffer = memoryview(bytearray(min(_PIECE_BYTES, entry.size)))
    with target.create(path, entry.size, stamp=stamp, durable=True) as writer:
        for at in range(0, entry.size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, entry.size - at)]
            source.read_into(path, at, piece)
            writer.write_at(at, piece)
    if not source.exists(path):  # removed meanwhile, perhaps there before it was
        target.delete(path)
    return entry.size
