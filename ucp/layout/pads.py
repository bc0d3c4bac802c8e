"""Sizes of padding: inferred from what was saved, or the smallest that makes the cuts come out even."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ucp.errors import FitError
from ucp.layout.expr import Concat, Dim, Every, Expr, Layout, Pad, Product
from ucp.layout.invalid import LayoutError
from ucp.layout.region import Shape
from ucp.layout.setting import Setting
from ucp.layout.spell import cut_name, spell

Pads = Mapping[tuple[int, int], int]
"""Size of each padding by (dim of the tensor, number of the padding in that dim, both in order)."""


def count_pads(expr: Expr) -> int:
    """Number of paddings in `expr`."""
    match expr:
        case Pad():
            return 1
        case Product(items=inner) | Concat(parts=inner):
            return sum(count_pads(item) for item in inner)
        case Every(item=item):
            return count_pads(item)
    return 0


def saved_pads(
    layout: Layout, shape: Shape, *, setting: Setting, coordinate: Mapping[str, int]
) -> dict[tuple[int, int], int]:
    """Sizes of the padding of a tensor that was saved with the local `shape` at `coordinate`.

    With two paddings in one dim their sizes are not in the shape: the smallest are taken, as on export.
    FitError where no padding gives that shape.
    """
    if len(shape) != len(layout.dims):
        raise FitError(f"the layout has {len(layout.dims)} dims, but the tensor has shape {list(shape)}")
    found: dict[tuple[int, int], int] = {}
    for number, (dim, length) in enumerate(zip(layout.dims, shape, strict=True)):
        pads = count_pads(dim)
        if pads == 1:
            found[number, 0] = _inferred(dim, length, setting, coordinate)
        elif pads:
            found.update({(number, k): size for k, size in enumerate(smallest(dim, setting, coordinate))})
    return found


def smallest(expr: Expr, setting: Setting, coordinate: Mapping[str, int]) -> list[int]:
    """Sizes of the paddings of `expr` in order, each the smallest that fits its cuts and `align`."""
    sizes: list[int] = []
    _measure(expr, setting, coordinate, sizes)
    return sizes


def _measure(expr: Expr, setting: Setting, coordinate: Mapping[str, int], sizes: list[int]) -> int:
    """Local length of `expr`; appends the sizes of its paddings to `sizes`."""
    match expr:
        case Dim():
            length = setting.size(expr)
        case Product(items=items):
            length = math.prod([_measure(item, setting, coordinate, sizes) for item in items])
        case Concat():
            length = _concat_length(expr, setting, coordinate, sizes)
        case _:
            raise LayoutError(f"`{spell(expr)}` cannot stand alone", node=expr)
    return _after_cuts(expr, length, setting, coordinate)


def _concat_length(expr: Concat, setting: Setting, coordinate: Mapping[str, int], sizes: list[int]) -> int:
    pads = [part for part in expr.parts if isinstance(part, Pad)]
    if len(pads) > 1:
        raise LayoutError("two paddings in one concatenation", node=pads[1])
    length, slot = 0, -1
    for part in expr.parts:
        if isinstance(part, Pad):
            slot = len(sizes)
            sizes.append(0)
        else:
            length += _measure(part, setting, coordinate, sizes)
    if pads:
        sizes[slot] = pad_size(expr, pads[0], length, setting)
        length += sizes[slot]
    return length


def pad_size(expr: Concat, pad: Pad, length: int, setting: Setting) -> int:
    """Elements of `pad` after `length` elements of the rest of `expr`: the fewest that let its cuts come out even."""
    axes = tuple(cut.axis for cut in expr.cuts)
    recorded = setting.cuts.get((cut_name(expr), axes)) if axes else None
    if recorded:
        return max(0, recorded[-1] - length)
    pieces = math.prod(setting.degree(axis) for axis in axes)
    align = 1 if pad.align is None else setting.value(pad.align)
    if align < 1:
        raise LayoutError(f"`align` comes out as {align}; it must be at least 1", node=pad)
    return -length % math.lcm(pieces, align)


def _after_cuts(expr: Dim | Product | Concat, length: int, setting: Setting, coordinate: Mapping[str, int]) -> int:
    if not expr.cuts:
        return length
    return sum(count for _, count in setting.runs(cut_name(expr), expr.cuts, length, coordinate))


def _inferred(expr: Expr, saved: int, setting: Setting, coordinate: Mapping[str, int]) -> int:
    """Size of the one padding in `expr` that makes its local length `saved`."""
    for inside, length in _descent(expr, saved, setting, coordinate):
        if isinstance(inside, Pad):
            return length
    # The coordinate holds nothing that is beside the padding, so any size gives the saved shape.
    return smallest(expr, setting, coordinate)[0]


def _descent(expr: Expr, saved: int, setting: Setting, coordinate: Mapping[str, int]) -> Iterator[tuple[Expr, int]]:
    """Expressions on the way down to the padding, each with the local length it must have before its cuts."""
    if isinstance(expr, Product | Concat) and expr.cuts:
        saved = _before_cuts(expr, saved, setting)
    yield expr, saved
    match expr:
        case Product(items=items):
            rest = math.prod(length_of(item, setting, coordinate) for item in items if not count_pads(item))
            if rest == saved == 0:
                return
            if rest == 0 or saved % rest:
                raise FitError(f"`{spell(expr)}`: a length of {saved} is not a multiple of {rest}")
            inner, length = next(item for item in items if count_pads(item)), saved // rest
        case Concat(parts=parts):
            rest = sum(length_of(part, setting, coordinate) for part in parts if not count_pads(part))
            if saved < rest:
                raise FitError(f"`{spell(expr)}`: {saved} elements were saved, but {rest} are no padding")
            inner, length = next(part for part in parts if count_pads(part)), saved - rest
        case _:
            return
    yield from _descent(inner, length, setting, coordinate)


def _before_cuts(expr: Product | Concat, saved: int, setting: Setting) -> int:
    axes = tuple(cut.axis for cut in expr.cuts)
    recorded = setting.cuts.get((cut_name(expr), axes))
    return recorded[-1] if recorded else saved * math.prod(setting.degree(axis) for axis in axes)


def length_of(expr: Expr, setting: Setting, coordinate: Mapping[str, int]) -> int:
    """Local length of `expr` at `coordinate`, with the smallest padding."""
    return _measure(expr, setting, coordinate, [])
