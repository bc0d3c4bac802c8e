"""Programs on arrays in memory: shards to logical tensors and back, with NumPy.

For tests, for moving small models between frameworks, and as the plainest statement of what blocks mean. Checkpoints
take the same blocks through the engine, which never holds a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ucp.errors import ConflictError, FitError
from ucp.lang.ast import Program
from ucp.lang.bind import Bound, Placements, bind
from ucp.lang.export import Shard, export
from ucp.lang.flat import flatten
from ucp.lang.held import Held
from ucp.lang.match import describe
from ucp.lang.solve import Cuts
from ucp.layout import Box, Mesh
from ucp.layout.block import Block, View, linear
from ucp.layout.region import row_major_strides

Array = npt.NDArray[Any]
At = tuple[tuple[str, int], ...]
"""A coordinate as pairs of axis and index, sorted by axis: what `at` makes of a mapping."""


def at(**coordinate: int) -> At:
    """A coordinate as a key: ``at(pp=0, tp=1)``."""
    return tuple(sorted(coordinate.items()))


def gather(
    program: Program,
    shards: Mapping[At, Mapping[str, Array]],
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    state: str = "value",
) -> dict[str, Array]:
    """The logical tensors that the `shards` of each coordinate make up. Ties give every alias too.

    ConflictError where replicas differ in a bit; otherwise the errors of `bind`. Casts are left to the caller.
    """
    held, arrays = [], []
    for coordinate, tensors in shards.items():
        for name, array in tensors.items():
            held.append(Held(name, array.shape, array.dtype.name, dict(coordinate), state))
            arrays.append(np.ascontiguousarray(array).reshape(array.shape))
    bound = bind(program, held, mesh=mesh, sizes=sizes, config=config, flags=flags, cuts=cuts, placements=placements)
    found = {name: _gathered(bound, (name, kind), arrays, held) for name, kind in bound.tensors}
    return {**found, **{alias: found[name] for alias, name in bound.ties.items()}}


def _gathered(bound: Bound, key: tuple[str, str], arrays: Sequence[Array], held: Sequence[Held]) -> Array:
    tensor = bound.tensors[key]
    pieces = bound.pieces[key]
    dtype = arrays[pieces[0].held].dtype if pieces else np.dtype(np.float32)
    if key in bound.reduces:
        terms = 1 + max((piece.term for piece in pieces), default=0)
        whole_numbers = dtype.kind in "iub"
        total = np.zeros(tensor.shape, object if whole_numbers else np.float64)
        first: dict[tuple[int, Box], Array] = {}
        for piece in sorted(pieces, key=lambda piece: piece.replica):
            part = shard_part(arrays[piece.held], piece.block)
            if piece.replica == 0:
                inside(total, tensor.view, piece.block)[...] += part
            _same_copies(key[0], first.setdefault((piece.term, piece.block.box), part), part, held[piece.held])
        if whole_numbers:
            return _whole_sum(key[0], total, dtype, bound.reduces[key])
        return (total / terms if bound.reduces[key] == "mean" else total).astype(dtype)
    whole = np.empty(tensor.shape, dtype)
    for piece in sorted(pieces, key=lambda piece: piece.replica):
        part = shard_part(arrays[piece.held], piece.block)
        target = inside(whole, tensor.view, piece.block)
        if piece.replica == 0:
            target[...] = part
        _same_copies(key[0], target, part, held[piece.held])
    return whole


def _whole_sum(name: str, total: Array, dtype: np.dtype[Any], kind: str) -> Array:
    if kind == "mean":
        raise FitError(f"{name}: no mean in {dtype}", hint="say `any` in the program if the copies are equal")
    limits = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
    if total.size and not limits.min <= total.min() <= total.max() <= limits.max:
        raise FitError(f"{name}: the sum of integers does not fit in {dtype}")
    return total.astype(dtype)


def _same_copies(name: str, first: Array, other: Array, held: Held) -> None:
    if not _same_bits(first, other):
        raise ConflictError(f"{name}: {held} differs from its other copies")


def scatter(
    program: Program,
    logical: Mapping[str, Array],
    *,
    mesh: Mesh,
    coordinates: Iterable[At] | None = None,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Cuts | None = None,
    placements: Placements | None = None,
    state: str = "value",
) -> dict[At, dict[str, Array]]:
    """The shards of the `logical` tensors at each of `coordinates`; without them, at every one of the whole mesh.

    A tensor that stands under two names is taken for tied. Padding is zero. The errors of `export`.
    """
    second = {describe(tie.alias) for tie in flatten(program).ties}
    first = {id(logical[name]): name for name in sorted(logical, key=lambda name: name not in second)}
    ties = {name: first[id(array)] for name, array in logical.items() if first[id(array)] != name}
    shapes = {name: array.shape for name, array in logical.items() if name not in ties}
    exporter = export(
        program, shapes, mesh=mesh, sizes=sizes, config=config, flags=flags, cuts=cuts, placements=placements, ties=ties
    )
    chosen = [at(**c) for c in mesh.coordinates()] if coordinates is None else list(coordinates)
    return {
        place: {
            shard.name: make(shard, logical, exporter.aliases) for shard in exporter.shards([dict(place)], state=state)
        }
        for place in chosen
    }


def make(shard: Shard, logical: Mapping[str, Array], aliases: Mapping[str, str]) -> Array:
    """One shard, filled from the logical tensors."""
    names = [wanted.name for wanted in shard.blocks] or list(shard.tensors) or list(logical)
    made = np.zeros(shard.shape, logical[_holder(names[0], logical, aliases)].dtype)
    for wanted in shard.blocks:
        source = logical[_holder(wanted.name, logical, aliases)]
        shard_part(made, wanted.block)[...] = inside(source, wanted.view, wanted.block)
    return made


def _holder(name: str, logical: Mapping[str, Array], aliases: Mapping[str, str]) -> str:
    return name if name in logical else aliases[name]


def inside(tensor: Array, view: View, block: Block) -> Array:
    """The elements of the block in the logical tensor, which must be contiguous; a view of it."""
    slices = (slice(a, b) for a, b in zip(block.box.start, block.box.stop, strict=True))
    # With the ellipsis a tensor without dims is an array too.
    index: Any = (*slices, ...)
    part: Array = tensor.reshape(view.shape)[index]
    return part


def shard_part(shard: Array, block: Block) -> Array:
    """The elements of the block in the shard, in the order of the view's factors; a view of it."""
    strides = row_major_strides(shard.shape)
    offset, steps = linear(block, strides)
    flat = shard.reshape(-1)
    if not block.size:
        return flat[:0].reshape(block.box.shape)
    size = shard.itemsize
    return np.lib.stride_tricks.as_strided(flat[offset:], block.box.shape, [step * size for step in steps])


def _same_bits(a: Array, b: Array) -> bool:
    kind = f"u{a.itemsize}"
    return a.dtype == b.dtype and bool((np.ascontiguousarray(a).view(kind) == np.ascontiguousarray(b).view(kind)).all())
