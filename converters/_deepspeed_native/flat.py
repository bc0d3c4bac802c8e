"""Tensors of a file to be written that are put together from parts of the source, and their way into a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ucp.catalog import Catalog
from ucp.container.leaves import leaf_bytes
from ucp.container.torchwrite import Slot, TorchFrame, Zeros
from ucp.container.values import Reference
from ucp.layout import Box, FlatRange, itemsize
from ucp.plan import Cover, Extent, Fragment, Key, Section, Task, TensorSpec, Witness
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

from .partition import Piece

_SMALL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A tensor whose bytes are `parts`, sections and zeros, one after the other. One object is one storage."""

    spec: TensorSpec
    parts: tuple[Section | Zeros, ...]


def whole(cover: Cover, *, dtype: str | None = None) -> Flat:
    """One tensor of the source, in `dtype` or its own."""
    spec = replace(cover.spec, dtype=dtype or cover.spec.dtype)
    return Flat(spec, (_section(cover, FlatRange(0, cover.spec.size), spec.dtype),) if spec.size else ())


def joined(catalog: Catalog, pieces: Sequence[Piece], state: str, *, dtype: str) -> Flat:
    """A flat tensor of `pieces` of one state; parameters that lack it have zeros. Values are checked on the way."""
    width = itemsize(dtype)
    parts: list[Section | Zeros] = []
    for piece in pieces:
        if piece.name is None or state not in catalog.tensors[piece.name].states:
            parts.append(Zeros(piece.length * width))
            continue
        witness = catalog.witness(piece.name) if state == "value" else None
        region = FlatRange(piece.start, piece.length)
        parts.append(_section(catalog.cover(piece.name, state), region, dtype, witness))
    return Flat(TensorSpec((sum(piece.length for piece in pieces),), dtype), tuple(parts))


def _section(cover: Cover, region: FlatRange, dtype: str, witness: Witness | None = None) -> Section:
    return Section(0, region, cover, witness, "" if dtype == cover.spec.dtype else dtype)


class Leaves:
    """Bytes of the small tensors of the training state that lies in a store, each read once for all files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[Extent, bytes] = {}

    def bytes(self, leaf: TensorLeaf) -> bytes:
        """What `leaf` holds."""
        if leaf.inline is not None:
            return leaf.inline
        if leaf.extent not in self._known:
            self._known[leaf.extent] = leaf_bytes(self._store, leaf)
        return self._known[leaf.extent]


def task(path: str, tree: Tree, leaves: Leaves, *, classes: frozenset[str]) -> Task:
    """The task that writes `tree`, which holds `Flat` tensors and `leaves`, as a torch file."""
    placing = _Placing(leaves)
    placed = placing.value(tree)
    frame = TorchFrame.of(placed, archive=path.rpartition("/")[2].removesuffix(".pt"), classes=classes)
    sections = (
        Section(offset, section.region, section.cover, section.witness, section.dtype)
        for section, offset in zip(placing.sections, frame.offsets, strict=True)
    )
    return Task(path, frame.size, frame, tuple(sections))


class _Placing:
    """Numbers slots and collects their sections in the order in which a pickle comes upon them."""

    def __init__(self, leaves: Leaves) -> None:
        self.sections: list[Section] = []
        self._leaves = leaves
        self._slots: dict[Flat, Slot] = {}

    def value(self, node: Tree) -> Tree:
        """`node` with every tensor a slot or inline."""
        if isinstance(node, Flat):
            return self._slot(node)
        if isinstance(node, TensorLeaf):
            return self._leaf(node)
        if isinstance(node, dict):
            return type(node)((key, self.value(value)) for key, value in node.items())
        if isinstance(node, list | tuple):
            return type(node)(self.value(item) for item in node)
        if isinstance(node, Opaque) and not isinstance(node, Reference):
            args, items = self.value(node.args), self.value(node.items)
            pairs = [(key, self.value(value)) for key, value in node.pairs]
            return replace(node, args=args, items=items, pairs=pairs, state=self.value(node.state))
        return node

    def _slot(self, flat: Flat) -> Slot:
        known = self._slots.get(flat)
        if known is None:
            sections = [part for part in flat.parts if isinstance(part, Section)]
            parts = tuple(part if isinstance(part, Zeros) else part.nbytes for part in flat.parts)
            known = self._slots[flat] = Slot(len(self._slots), flat.spec, parts)
            self.sections += sections
        return known

    def _leaf(self, leaf: TensorLeaf) -> Tree:
        """Small tensors of the training state are read now; large ones are sections like any other."""
        extent = leaf.extent
        if leaf.inline is not None or leaf.numpy or extent.nbytes <= _SMALL_BYTES:
            return replace(leaf, inline=self._leaves.bytes(leaf))
        spec = TensorSpec(extent.shape, extent.dtype)
        cover = Cover.of(Key(f"{extent.object}:{extent.offset}", "state"), spec, (_whole_extent(extent),))
        return self._slot(whole(cover))


def _whole_extent(extent: Extent) -> Fragment:
    return Fragment(Box.whole(extent.shape), extent)
