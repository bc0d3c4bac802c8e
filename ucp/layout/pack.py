"""Flat buffers of many parameters: which elements of which parameter lie where in a rank's buffer.

``(*param + _ align 2*dp)/dp`` joins all parameters, pads the end and cuts the whole (ZeRO stage 1 and 2);
``*((param + _)/dp)`` pads and cuts each parameter by itself and joins the pieces (stage 3);
``(*(param + _ align 64) + _ align 128)/dp``, reversed, is a bucket of Megatron's distributed optimizer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ucp.errors import FitError
from ucp.layout.branches import all_cuts
from ucp.layout.expr import Concat, Cut, Dim, Every, Expr, Pad, Product
from ucp.layout.invalid import LayoutError
from ucp.layout.pads import pad_size
from ucp.layout.region import FlatRange
from ucp.layout.setting import Setting
from ucp.layout.spell import cut_name, spell

PARAM = "param"
"""The dim of a pack that stands for all elements of one parameter."""


class Packed(NamedTuple):
    """Elements `range` of parameter number `param`, row-major, lie in the buffer from element `offset` on."""

    param: int
    range: FlatRange
    offset: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """The flat buffer of one coordinate: its length in elements with padding, and what lies there, in order."""

    length: int
    parts: tuple[Packed, ...]


def compile_pack(
    expr: Expr,
    sizes: Sequence[int],
    *,
    setting: Setting,
    coordinate: Mapping[str, int],
    reverse: bool = False,
    saved: int | None = None,
) -> Buffer:
    """The buffer at `coordinate` of parameters with `sizes` elements, in the order that the source records.

    Parameter numbers count in that order, also where `reverse` lays them out from the last to the first. Parameters
    that an axis outside the pack cuts (tensor parallelism) are given by their local sizes. `saved` is the length of the
    buffer as the source holds it: padding at its end may have been left out, or there may be more than was needed.

    LayoutError where `expr` is no pack, FitError where sizes, mesh or `saved` do not fit it.
    """
    inner = {cut.axis for cut in all_cuts(expr)} - {cut.axis for cut in _own_cuts(expr)}
    at = tuple(sorted((axis, setting.index(axis, coordinate)) for axis in inner))
    found = _held(expr, _flat(expr, tuple(sizes), setting, at, reverse, None), setting, coordinate)
    if saved is None or saved == found.length:
        return found
    if saved > found.length:
        total = saved * math.prod(setting.degree(cut.axis) for cut in _own_cuts(expr))
        found = _held(expr, _flat(expr, tuple(sizes), setting, at, reverse, total), setting, coordinate)
    elif all(part.offset + part.range.length <= saved for part in found.parts[-1:]):
        return Buffer(saved, found.parts)
    if found.length != saved:
        raise FitError(
            f"a flat buffer has {saved} elements, but `{spell(expr)}` of {len(sizes)} parameters has {found.length}",
            hint="compare the order and sizes of the parameters, and the ranks of the mesh, with those of the source",
        )
    return found


@lru_cache(maxsize=1024)
def _flat(
    expr: Expr,
    sizes: tuple[int, ...],
    setting: Setting,
    at: tuple[tuple[str, int], ...],
    reverse: bool,
    total: int | None,
) -> Buffer:
    """All of `expr` before its own cuts. Kept, since every rank of these cuts asks for it."""
    order = range(len(sizes))
    return _whole(expr, _Pack(sizes, order[::-1] if reverse else order, setting, dict(at), total), None)


class _Pack(NamedTuple):
    """What is packed, and where it is asked for."""

    sizes: tuple[int, ...]
    order: Iterable[int]
    setting: Setting
    coordinate: Mapping[str, int]
    total: int | None
    """Length of the outermost expression before its cuts, where that is known."""


def _content(expr: Expr, pack: _Pack, param: int | None) -> Buffer:
    pack = pack._replace(total=None)
    return _held(expr, _whole(expr, pack, param), pack.setting, pack.coordinate)


def _whole(expr: Expr, pack: _Pack, param: int | None) -> Buffer:
    """`expr` before its cuts; `param` is the parameter that an `Every` around it is at."""
    match expr:
        case Dim(name=name) if name == PARAM and param is not None:
            size = pack.sizes[param]
            return Buffer(size, (Packed(param, FlatRange(0, size), 0),) if size else ())
        case Every(item=item) if param is None:
            return _joined(_content(item, pack, number) for number in pack.order)
        case Concat():
            return _concat(expr, pack, param)
        case Product(items=(item,)):
            return _content(item, pack, param)
    raise LayoutError(
        f"`{spell(expr)}` cannot stand here in a pack",
        node=expr,
        hint=f"a pack is made of `*{PARAM}`, `+`, cuts and `_`",
    )


def _concat(expr: Concat, pack: _Pack, param: int | None) -> Buffer:
    pads = [part for part in expr.parts if isinstance(part, Pad)]
    if len(pads) > 1:
        raise LayoutError("two paddings in one concatenation", node=pads[1])
    parts = [None if isinstance(part, Pad) else _content(part, pack, param) for part in expr.parts]
    rest = sum(part.length for part in parts if part is not None)
    padding = Buffer(0, ())
    if pads:
        known = None if pack.total is None else pack.total - rest
        padding = Buffer(pad_size(expr, pads[0], rest, pack.setting) if known is None else max(0, known), ())
    return _joined(padding if part is None else part for part in parts)


def _joined(buffers: Iterable[Buffer]) -> Buffer:
    found: list[Packed] = []
    length = 0
    for buffer in buffers:
        found.extend(part._replace(offset=length + part.offset) for part in buffer.parts)
        length += buffer.length
    return Buffer(length, tuple(found))


def _held(expr: Expr, whole: Buffer, setting: Setting, coordinate: Mapping[str, int]) -> Buffer:
    """What the cuts of `expr` leave to `coordinate`."""
    cuts = _own_cuts(expr)
    if not cuts or isinstance(expr, Pad | Every):
        return whole
    runs = setting.runs(cut_name(expr), cuts, whole.length, coordinate)
    start, count = runs[0] if runs else (0, 0)
    return Buffer(count, tuple(_between(whole, start, start + count)))


def _between(whole: Buffer, start: int, stop: int) -> Iterator[Packed]:
    """Parts of `whole` in [start, stop), where position `start` becomes 0."""
    first = max(0, bisect_right(whole.parts, start, key=lambda part: part.offset) - 1)
    for part in whole.parts[first:]:
        if part.offset >= stop:
            return
        low, high = max(start, part.offset), min(stop, part.offset + part.range.length)
        if low < high:
            yield Packed(part.param, FlatRange(part.range.start + low - part.offset, high - low), low - start)


def _own_cuts(expr: Expr) -> tuple[Cut, ...]:
    if isinstance(expr, Pad | Every):
        return ()
    for cut in expr.cuts:
        if cut.placed:
            raise LayoutError(f"`@{cut.axis}`: a pack is cut in rank order", node=cut)
    return expr.cuts
