"""What equations mean, element by element: the slow and plain reading that compiled blocks are compared with.

A dim expression is a list with one entry per position, so a cut is a slice and a concatenation is a sum of lists. It
shares nodes and recorded geometry with `ucp.layout.compile`, and no code that computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ucp.layout import Compiled, Setting, Shape
from ucp.layout.expr import Arith, Concat, Cut, Dim, Expr, Layout, Name, Number, Pad, Product

Names = tuple[tuple[str, int], ...]


class Spot(NamedTuple):
    """One position of a dim: which part was chosen in each concatenation, and the index of every leaf."""

    path: tuple[int, ...]
    leaves: Mapping[str, int]


Row = list[Spot | None]
"""The positions of a dim in order; None is padding."""


class Element(NamedTuple):
    """An element of a logical tensor: number of the target, values in its name, row-major position."""

    target: int
    names: Names
    position: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What a coordinate holds: the shape of its tensor, and for each element in row-major order what it is."""

    shape: Shape
    elements: tuple[Element | None, ...]


def read_shard(
    source: Layout,
    targets: Sequence[Layout],
    *,
    setting: Setting,
    coordinate: Mapping[str, int],
    fixed: Mapping[str, int] | None = None,
    captured: Sequence[frozenset[str]] = (),
    pad: Mapping[tuple[int, int], int] | None = None,
) -> Shard:
    """The shard of `coordinate`, element by element. Arguments are those of `ucp.layout.compile_layout`."""
    rows = []
    for number, dim in enumerate(source.dims):
        sizes = None if pad is None else iter(pad[number, k] for k in range(len(pad)) if (number, k) in pad)
        rows.append(read_dim(dim, setting, coordinate, sizes))
    order = {path: k for k, path in enumerate(tensor_paths(source))}
    elements: list[Element | None] = []
    for spots in itertools.product(*rows):
        known = [spot for spot in spots if spot is not None]
        if len(known) < len(spots):
            elements.append(None)
            continue
        target = order[tuple(spot.path for spot in known)]
        leaves = dict(fixed or {})
        for spot in known:
            leaves.update(spot.leaves)
        named = captured[target] if captured else frozenset()
        names = tuple(sorted((name, leaves[name]) for name in named))
        elements.append(Element(target, names, _position(targets[target], leaves, setting)))
    return Shard(tuple(len(row) for row in rows), tuple(elements))


def expand(compiled: Compiled) -> Shard:
    """Compiled blocks, element by element, to compare with what `read_shard` says."""
    found: list[Element | None] = [None] * math.prod(compiled.shape)
    for number, (view, placed) in enumerate(zip(compiled.views, compiled.blocks, strict=True)):
        for block, names in ((item.block, item.names) for item in placed):
            for index in itertools.product(*(range(n) for n in block.box.shape)):
                at = list(block.start)
                for i, (dim, stride) in zip(index, block.steps, strict=True):
                    if i:
                        at[dim] += i * stride
                here = _ravel(at, compiled.shape)
                there = _ravel([a + i for a, i in zip(block.box.start, index, strict=True)], view.shape)
                assert found[here] is None, "two blocks hold the same element of the shard"
                found[here] = Element(number, names, there)
    return Shard(compiled.shape, tuple(found))


def scatter(compiled: Compiled, tensors: Mapping[tuple[int, Names], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The shard that holds `tensors`, given by (number of the target, values in its name); padding is 0."""
    shard = np.zeros(compiled.shape, np.int64)
    for inside, outside in _windows(compiled, tensors):
        inside(shard)[...] = outside
    return shard


def gather(
    compiled: Compiled, shard: NDArray[np.int64], tensors: Mapping[tuple[int, Names], NDArray[np.int64]]
) -> None:
    """Add the elements of `shard` to `tensors`; the inverse of `scatter` where these were zeros before."""
    for inside, outside in _windows(compiled, tensors):
        np.add(outside, inside(shard), out=outside)


class _Inside(NamedTuple):
    start: Shape
    shape: Shape
    steps: tuple[tuple[int, int], ...]

    def __call__(self, shard: NDArray[np.int64]) -> NDArray[np.int64]:
        strides = [0 if dim < 0 else step * shard.strides[dim] for dim, step in self.steps]
        first = _window(shard, [slice(a, None) for a in self.start])
        return np.lib.stride_tricks.as_strided(first, self.shape, strides)


def _window(array: NDArray[np.int64], slices: Sequence[slice]) -> NDArray[np.int64]:
    index: tuple[slice | EllipsisType, ...] = (*slices, ...)
    return array[index]


def _windows(
    compiled: Compiled, tensors: Mapping[tuple[int, Names], NDArray[np.int64]]
) -> Iterator[tuple[_Inside, NDArray[np.int64]]]:
    for number, (view, placed) in enumerate(zip(compiled.views, compiled.blocks, strict=True)):
        for block, names in ((item.block, item.names) for item in placed):
            seen = tensors[number, names].reshape(view.shape)
            assert np.shares_memory(seen, tensors[number, names]), "give contiguous tensors"
            box = [slice(a, b) for a, b in zip(block.box.start, block.box.stop, strict=True)]
            yield _Inside(block.start, block.box.shape, block.steps), _window(seen, box)


def tensor_paths(source: Layout) -> list[tuple[tuple[int, ...], ...]]:
    """The choices of parts that are a logical tensor, in the order of the targets."""
    ways = itertools.product(*(list(_paths(dim)) for dim in source.dims))
    return [tuple(path for path in way if path is not None) for way in ways if None not in way]


def _paths(expr: Expr) -> Iterator[tuple[int, ...] | None]:
    match expr:
        case Dim():
            yield ()
        case Pad():
            yield None
        case Product(items=items):
            for way in itertools.product(*(list(_paths(item)) for item in items)):
                yield None if None in way else sum((path for path in way if path is not None), ())
        case Concat(parts=parts):
            for k, part in enumerate(parts):
                for path in _paths(part):
                    yield None if path is None else (k, *path)


def read_dim(expr: Expr, setting: Setting, coordinate: Mapping[str, int], pads: Iterator[int] | None) -> Row:
    """The positions of `expr` at `coordinate`. `pads`: sizes of the padding; None: the smallest that fits."""
    match expr:
        case Dim(name=name):
            row: Row = [Spot((), {} if name == "1" else {name: i}) for i in range(_size(expr, setting))]
        case Product(items=items):
            rows = [read_dim(item, setting, coordinate, pads) for item in items]
            row = [_merged(spots) for spots in itertools.product(*rows)]
        case Concat():
            row = _read_concat(expr, setting, coordinate, pads)
        case _:
            raise AssertionError("padding is read by its concatenation")
    return _cut(row, expr, setting, coordinate)


def _merged(spots: Sequence[Spot | None]) -> Spot | None:
    known = [spot for spot in spots if spot is not None]
    if len(known) < len(spots):
        return None
    leaves: dict[str, int] = {}
    for spot in known:
        leaves |= spot.leaves
    return Spot(sum((spot.path for spot in known), ()), leaves)


def _read_concat(expr: Concat, setting: Setting, coordinate: Mapping[str, int], pads: Iterator[int] | None) -> Row:
    rows: list[Row] = []
    where: int | None = None
    align = 1
    for k, part in enumerate(expr.parts):
        if isinstance(part, Pad):
            where, align = k, 1 if part.align is None else value(part.align, setting)
            rows.append([] if pads is None else [None] * next(pads))
        else:
            row = read_dim(part, setting, coordinate, pads)
            rows.append([spot and Spot((k, *spot.path), spot.leaves) for spot in row])
    if where is not None and pads is None:
        rest = sum(map(len, rows))
        while not _fits(rest + len(rows[where]), expr, align, setting):
            rows[where].append(None)
    return [spot for row in rows for spot in row]


def _fits(length: int, expr: Concat, align: int, setting: Setting) -> bool:
    recorded = setting.cuts.get((_called(expr), tuple(cut.axis for cut in expr.cuts)))
    if recorded:
        return length >= recorded[-1]
    pieces = math.prod(setting.mesh[cut.axis] for cut in expr.cuts)
    return length % pieces == 0 and length % align == 0


def _cut(row: Row, expr: Dim | Product | Concat, setting: Setting, coordinate: Mapping[str, int]) -> Row:
    cuts = list(expr.cuts)
    if cuts and cuts[0].placed:
        first: Cut = cuts.pop(0)
        row = [row[i] for i in setting.placements[_called(expr), first.axis][coordinate[first.axis]]]
    recorded = setting.cuts.get((_called(expr), tuple(cut.axis for cut in cuts)))
    if recorded is not None:
        sizes = [setting.mesh[cut.axis] for cut in cuts]
        which = _ravel([coordinate.get(cut.axis, 0) for cut in cuts], tuple(sizes))
        return row[recorded[which] : recorded[which + 1]]
    for cut in cuts:
        each, rest = divmod(len(row), setting.mesh[cut.axis])
        assert rest == 0, "an uneven cut that nobody recorded"
        row = row[coordinate.get(cut.axis, 0) * each :][:each]
    return row


def _called(expr: Dim | Product | Concat) -> str:
    """Name of a dim in recorded geometry. Composed dims are told apart by their text, whoever spells it."""
    from ucp.layout.spell import cut_name

    return cut_name(expr)


def _size(dim: Dim, setting: Setting) -> int:
    return int(dim.name) if dim.name.isdecimal() else setting.sizes.get(dim.name, 0) or setting.mesh[dim.name]


def value(arith: Arith, setting: Setting) -> int:
    """Result of arithmetic over sizes and axes."""
    match arith:
        case Number(value=number):
            return number
        case Name(name=name):
            return setting.sizes.get(name, 0) or setting.mesh[name]
    left, right = value(arith.left, setting), value(arith.right, setting)
    results = {
        "+": left + right,
        "-": left - right,
        "*": left * right,
        "min": min(left, right),
        "max": max(left, right),
    }
    return results[arith.op] if arith.op in results else left // right


def _position(target: Layout, leaves: Mapping[str, int], setting: Setting) -> int:
    """Row-major position in a logical tensor of the element with these indices."""
    dims = [dim for expr in target.dims for dim in (expr.items if isinstance(expr, Product) else (expr,))]
    position = 0
    for dim in dims:
        assert isinstance(dim, Dim)
        position = position * _size(dim, setting) + (0 if dim.name == "1" else leaves[dim.name])
    return position


def _ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    position = 0
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position
