"""That the pieces of a logical tensor hold every element: which copy is read, which are replicas, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ucp.layout import Box, Shape
from ucp.layout.block import Block


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of the `held`-th shard. `replica` 0 is the copy to read; the others are equal copies of such.

    Of a mean or a sum, `term` numbers what is averaged or added; each has replicas of its own.
    """

    held: int
    block: Block
    replica: int = 0
    term: int = 0


def place(found: Iterable[tuple[int, Block]], shape: Shape) -> tuple[list[Piece], Box | None]:
    """Number the copies of each region, and give a box of `shape` that nothing holds, if there is one.

    The first to hold an element is its primary copy. Where shards overlap in part, the common boxes are split off.
    """
    copies = _by_box(found)
    boxes = list(copies)
    clash = _overlapping(boxes)
    if clash:
        return _split(copies, shape)
    pieces = [Piece(held, block, n) for held_by in copies.values() for n, (held, block) in enumerate(held_by)]
    total = sum(box.size for box in boxes)
    whole = Box.whole(shape)
    return pieces, None if total == whole.size else _hole(whole, boxes)


def _by_box(found: Iterable[tuple[int, Block]]) -> dict[Box, list[tuple[int, Block]]]:
    """Who holds each box, in order. Replicas mostly share one block, which spares comparing boxes by value."""
    same: dict[int, list[tuple[int, Block]]] = {}
    boxes: dict[Box, list[tuple[int, Block]]] = {}
    for held, block in found:
        holders = same.get(id(block))
        if holders is None:
            if not block.box.size:
                continue
            holders = same[id(block)] = boxes.setdefault(block.box, [])
        holders.append((held, block))
    return boxes


def _overlapping(boxes: Sequence[Box]) -> bool:
    """Whether two different boxes have an element in common. Sorts along the dim that separates the most."""
    if len(boxes) < 2:
        return False
    dim = max(range(len(boxes[0].start)), key=lambda d: len({box.start[d] for box in boxes}), default=0)
    ordered = sorted(boxes, key=lambda box: box.start[dim : dim + 1])
    live: list[Box] = []
    for box in ordered:
        live = [other for other in live if other.stop[dim] > box.start[dim]]
        if any(other.intersect(box) for other in live):
            return True
        live.append(box)
    return False


def _split(copies: dict[Box, list[tuple[int, Block]]], shape: Shape) -> tuple[list[Piece], Box | None]:
    """Pieces where boxes overlap in part: each is cut along those before it."""
    primary: list[tuple[Box, int]] = []
    pieces = []
    for box, holders in copies.items():
        for held, block in holders:
            rest = [box]
            for number, (other, count) in enumerate(primary):
                common = box.intersect(other)
                if common is None:
                    continue
                pieces.append(Piece(held, _inside(block, common), count))
                primary[number] = (other, count + 1)
                rest = [piece for left in rest for piece in _without(left, common)]
            for left in rest:
                pieces.append(Piece(held, _inside(block, left)))
                primary.append((left, 1))
    return pieces, _hole(Box.whole(shape), [box for box, _ in primary])


def _inside(block: Block, box: Box) -> Block:
    """The part of a block inside `box`, which lies in the block's box."""
    first = zip(box.start, block.box.start, strict=True)
    return block.part([(a - b, n) for (a, b), n in zip(first, box.shape, strict=True)])


def _hole(whole: Box, boxes: Sequence[Box]) -> Box | None:
    rest = [whole] if whole.size else []
    for box in boxes:
        rest = [piece for left in rest for piece in _without(left, box)]
    return rest[0] if rest else None


def _without(box: Box, hole: Box) -> Iterator[Box]:
    """`box` less `hole`, as disjoint boxes."""
    common = box.intersect(hole)
    if common is None:
        yield box
        return
    start, stop = list(box.start), list(box.stop)
    for dim, (a, b) in enumerate(zip(common.start, common.stop, strict=True)):
        for low, high in ((start[dim], a), (b, stop[dim])):
            if low < high:
                first, last = [*start], [*stop]
                first[dim], last[dim] = low, high
                yield Box(tuple(first), tuple(y - x for x, y in zip(first, last, strict=True)))
        start[dim], stop[dim] = a, b
