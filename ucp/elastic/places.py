"""Whether the state of a job lies on its ranks as it did when a checkpoint was saved: box by box, not by name."""

from __future__ import annotations

from typing import Any

from ucp.catalog import Catalog
from ucp.format.native_shard import Piece
from ucp.layout import Box
from ucp.plan import Key
from ucp.train.declared import DeclaredLayout
from ucp.train.save.plan import slabs
from ucp.train.targets import take_apart


def lies_as_saved(state: Any, catalog: Catalog, *, layout: DeclaredLayout | None = None) -> bool:
    """Whether each box that this rank holds of `state` is one that was written, whole or in the slabs of a save.

    Two meshes with the same axes say nothing of that: tensors may be cut along other dims, or not at all.
    """
    targets = take_apart(state, layout=layout)
    written: dict[Key, set[Box]] = {}
    for slot in targets.slots:
        known = [name for name in slot.names if name in catalog.tensors and slot.state in catalog.tensors[name].states]
        if slot.empty or slot.echo or not known:
            continue
        key = Key(known[0], slot.state)
        if key not in written:
            written[key] = {one.region for one in catalog.fragments[key] if isinstance(one.region, Box)}
        dtype = catalog.tensors[key.name].states[key.state].dtype
        if not all(_was_written(Piece(key, dtype, place.region), written[key]) for place in slot.held().places):
            return False
    return True


def _was_written(piece: Piece, written: set[Box]) -> bool:
    return piece.box in written or {one.box for one in slabs(piece)} <= written
