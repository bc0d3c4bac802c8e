"""AutoTP's ``affine_map``: for every parameter and rank, which strided pieces of the whole lie where in the shard.

deepspeed/checkpoint/affine.py (``ParamAffineMap``, ``AffinePiece``) and its ``affine_ir_spec.md``, format version 1.
All maps that DeepSpeed makes cut along one dim: replicated, contiguous, fused, segmented (parts cut and parts whole)
and gathered blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.errors import CorruptError, FitError
from ucp.layout import Shape, numel, row_major_strides
from ucp.tree import Tree

from . import nodes
from .cuts import Along, Run, Whole, covers, disjoint

VERSION = 1


def from_affine(entry: Tree, shapes: Sequence[Shape], where: str) -> Whole | Along:
    """How ranks whose shards have `shapes` hold the parameter that `entry` describes.

    CorruptError if the pieces do not make up shards of these shapes or do not cover the parameter, FitError for pieces
    that are cut along several dims, or scaled.
    """
    tree = nodes.mapping(entry, where)
    whole = nodes.shape(tree.get("logical_shape"), f"{where}: logical_shape")
    ranks = nodes.mapping(tree.get("ranks"), f"{where}: ranks")
    if set(ranks) != set(range(len(shapes))):
        raise CorruptError(f"{where}: describes ranks {sorted(map(str, ranks))}, there are {len(shapes)}")
    if all(shape == whole for shape in shapes) and all(_is_copy(ranks[r], whole, where) for r in range(len(shapes))):
        return Whole()
    dim = _cut_dim(ranks, whole, shapes, where)
    runs = tuple(_runs(ranks[rank], whole, shape, dim, f"{where}: rank {rank}") for rank, shape in enumerate(shapes))
    if not covers(runs, whole[dim]):
        raise CorruptError(f"{where}: its ranks do not hold all of {list(whole)}")
    return Along(dim, whole[dim], runs)


def _cut_dim(ranks: Mapping[Any, Tree], whole: Shape, shapes: Sequence[Shape], where: str) -> int:
    """The dim in which shards differ from the whole; if none does, the one in which their pieces do."""
    differ = {k for shape in shapes for k in range(len(whole)) if len(shape) != len(whole) or shape[k] != whole[k]}
    if not differ:
        sizes = [_placed(piece, where)[0] for rank in ranks.values() for piece in _pieces(rank, where)]
        differ = {k for shape in sizes for k in range(len(whole)) if len(shape) == len(whole) and shape[k] != whole[k]}
    if len(differ) != 1 or len({len(whole), *map(len, shapes)}) > 1:
        raise FitError(f"{where}: shards of shapes {_listed(shapes)} of {list(whole)} are not cut along one dim")
    return differ.pop()


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _pieces(rank: Tree, where: str) -> list[Mapping[str, Tree]]:
    listed = nodes.sequence(nodes.mapping(rank, where).get("pieces"), f"{where}: pieces")
    pieces = [nodes.mapping(piece, where) for piece in listed]
    if any(piece.get("scale", 1.0) != 1.0 for piece in pieces):
        raise FitError(
            f"{where}: the rank holds the parameter scaled, which optimizer states do not survive",
            hint="DeepSpeed refuses it too; save such parameters without tensor parallelism",
        )
    return pieces


def _is_copy(rank: Tree, whole: Shape, where: str) -> bool:
    pieces = [_placed(piece, where) for piece in _pieces(rank, where)]
    return pieces == [(whole, 0, row_major_strides(whole), 0, row_major_strides(whole))]


def _placed(piece: Mapping[str, Tree], where: str) -> tuple[Shape, int, Shape, int, Shape]:
    """Shape, offset and strides in the whole, offset and strides in the shard."""
    shape = nodes.shape(piece.get("shape"), f"{where}: shape")
    sides: list[tuple[int, Shape]] = []
    for key in ("source", "dest"):
        side = nodes.sequence(piece.get(key), f"{where}: {key}")
        if len(side) != 2:
            raise CorruptError(f"{where}: {key} is no offset and strides")
        sides.append((nodes.integer(side[0], f"{where}: {key}"), nodes.shape(side[1], f"{where}: {key}")))
    return shape, *sides[0], *sides[1]


def _runs(rank: Tree, whole: Shape, shard: Shape, dim: int, where: str) -> tuple[Run, ...]:
    """Indices along `dim` that the rank holds, in its order."""
    source, dest = row_major_strides(whole), row_major_strides(shard)
    found: list[tuple[int, Run]] = []
    for piece in _pieces(rank, where):
        shape, offset, strides, place, steps = _placed(piece, where)
        if not numel(shape):
            continue
        length = shape[dim] if len(shape) == len(whole) else -1
        plain = (*whole[:dim], length, *whole[dim + 1 :])
        start, remainder = divmod(offset, source[dim])
        at, rest = divmod(place, dest[dim])
        if shape != plain or (strides, steps) != (source, dest) or remainder or rest:
            raise FitError(f"{where}: holds a piece that is no run of indices along dim {dim}")
        found.append((at, (start, length)))
    ordered = [run for _, run in sorted(found)]
    filled = 0
    for at, (_, length) in sorted(found):
        if at != filled:
            raise CorruptError(f"{where}: its pieces overlap or leave a gap")
        filled += length
    if filled != shard[dim] and numel(shard):
        raise CorruptError(f"{where}: its pieces hold {filled} indices along dim {dim}, the shard has {shard[dim]}")
    if any(start + length > whole[dim] for start, length in ordered) or not disjoint(ordered):
        raise CorruptError(f"{where}: its pieces lie outside the parameter or hold some of it twice")
    return tuple(ordered)
