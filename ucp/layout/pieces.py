"""What one coordinate holds of one dim of a tensor, as boxes of its leaf dims at affine positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ucp.layout.expr import Concat, Dim, Expr, Pad, Product
from ucp.layout.interval import boxes_between
from ucp.layout.invalid import LayoutError
from ucp.layout.setting import Setting
from ucp.layout.spell import cut_name, spell


class Leaf(NamedTuple):
    """Indices ``start .. start+size`` of a leaf dim; one step along it moves `stride` positions."""

    name: str
    start: int
    size: int
    stride: int


class Piece(NamedTuple):
    """A box of leaf dims, outer to inner; its first element is at position `offset`."""

    offset: int
    leaves: tuple[Leaf, ...]


class Content(NamedTuple):
    """`length` positions, and the pieces of each branch that lie there; None for a branch through padding."""

    length: int
    branches: tuple[tuple[Piece, ...] | None, ...]


class Holder(NamedTuple):
    """Whose content is asked for."""

    setting: Setting
    coordinate: Mapping[str, int]
    pads: Iterator[int]
    """Sizes of the paddings, in the order of the text."""


def content(expr: Expr, holder: Holder) -> Content:
    """Content of `expr` at a coordinate. Takes as many items of ``holder.pads`` as `expr` has paddings."""
    match expr:
        case Dim():
            whole = _dim(expr, holder.setting)
        case Product(items=items):
            whole = _composed([content(item, holder) for item in items])
        case Concat(parts=parts):
            whole = _joined([content(part, holder) for part in parts])
        case Pad():
            return Content(next(holder.pads), (None,))
        case _:
            raise LayoutError(f"`{spell(expr)}` stands in packs only", node=expr)
    if not expr.cuts:
        return whole
    return _held(whole, holder.setting.runs(cut_name(expr), expr.cuts, whole.length, holder.coordinate))


def _dim(dim: Dim, setting: Setting) -> Content:
    size = setting.size(dim)
    if dim.name == "1":
        return Content(1, ((Piece(0, ()),),))
    return Content(size, ((Piece(0, (Leaf(dim.name, 0, size, 1),)),) if size else (),))


def _composed(items: Sequence[Content]) -> Content:
    strides = [math.prod(item.length for item in items[k + 1 :]) for k in range(len(items))]
    branches: list[tuple[Piece, ...] | None] = []
    for choice in itertools.product(*(item.branches for item in items)):
        kept = [pieces for pieces in choice if pieces is not None]
        branches.append(
            tuple(_product(pieces, strides) for pieces in itertools.product(*kept)) if len(kept) == len(items) else None
        )
    return Content(math.prod(item.length for item in items), tuple(branches))


def _product(pieces: Sequence[Piece], strides: Sequence[int]) -> Piece:
    return Piece(
        sum(piece.offset * stride for piece, stride in zip(pieces, strides, strict=True)),
        tuple(
            leaf._replace(stride=leaf.stride * stride)
            for piece, stride in zip(pieces, strides, strict=True)
            for leaf in piece.leaves
        ),
    )


def _joined(parts: Sequence[Content]) -> Content:
    branches: list[tuple[Piece, ...] | None] = []
    length = 0
    for part in parts:
        branches.extend(
            pieces and tuple(Piece(length + p.offset, p.leaves) for p in pieces) for pieces in part.branches
        )
        length += part.length
    return Content(length, tuple(branches))


def _held(whole: Content, runs: Sequence[tuple[int, int]]) -> Content:
    """The positions of `runs`, one after the other."""
    branches: list[tuple[Piece, ...] | None] = []
    for pieces in whole.branches:
        if pieces is None:
            branches.append(None)
            continue
        found: list[Piece] = []
        offset = 0
        for start, count in runs:
            for piece in pieces:
                found.extend(_between(piece, start, count, offset))
            offset += count
        branches.append(tuple(found))
    return Content(sum(count for _, count in runs), tuple(branches))


def _between(piece: Piece, start: int, count: int, offset: int) -> Iterator[Piece]:
    """Parts of `piece` in [start, start+count), where position `start` becomes `offset`."""
    low = start - piece.offset
    for box in boxes_between([(leaf.stride, leaf.size) for leaf in piece.leaves], low, low + count):
        moved = sum(first * leaf.stride for (first, _), leaf in zip(box, piece.leaves, strict=True))
        leaves = tuple(
            leaf._replace(start=leaf.start + first, size=n) for (first, n), leaf in zip(box, piece.leaves, strict=True)
        )
        yield Piece(piece.offset + moved - start + offset, leaves)
