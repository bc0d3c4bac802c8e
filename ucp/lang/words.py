"""Blocks and layouts in words: which rows of a shard are which of a tensor, and a layout with its sizes filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from ucp.layout.block import Block, View
from ucp.layout.expr import Concat, Cut, Dim, Expr, Layout, Pad, Product
from ucp.layout.region import Shape, row_major_strides
from ucp.layout.setting import Setting

Step = tuple[int, int]
"""Distance and how many of them."""


def in_shard(block: Block, shape: Shape) -> str:
    """Where a block lies in its shard of `shape`: ``[0..8 every 16 (2 times), :]``."""
    dims = []
    for dim, (length, start) in enumerate(zip(shape, block.start, strict=True)):
        steps = [(stride, n) for n, (of, stride) in zip(block.box.shape, block.steps, strict=True) if of == dim]
        dims.append(_dim(start, steps, length))
    return f"[{', '.join(dims)}]"


def in_tensor(block: Block, view: View) -> str:
    """Where a block lies in the logical tensor that is seen through `view`: ``[0..16, :]``."""
    dims, first = [], 0
    for factors in view.factors:
        inside = slice(first, first + len(factors))
        strides = row_major_strides(factors)
        start = sum(a * stride for a, stride in zip(block.box.start[inside], strides, strict=True))
        dims.append(_dim(start, zip(strides, block.box.shape[inside], strict=True), prod(factors)))
        first += len(factors)
    return f"[{', '.join(dims)}]"


def order(block: Block) -> str:
    """``transposed`` or ``reordered`` where elements lie in another order in the shard than in the tensor, or ""."""
    moving = [step for n, step in zip(block.box.shape, block.steps, strict=True) if n > 1]
    dims = [dim for dim, _ in moving]
    if dims != sorted(dims):
        return "transposed"
    keys = [(dim, -stride) for dim, stride in moving]
    return "" if keys == sorted(keys) else "reordered"


def filled(layout: Layout, setting: Setting, coordinate: Mapping[str, int]) -> str:
    """A layout with local sizes instead of names: ``[1 × (4 × 128 + 128 + 128), 4096]``."""
    return f"[{', '.join(_filled(dim, setting, coordinate) for dim in layout.dims)}]"


def _dim(start: int, steps: Iterable[Step], length: int) -> str:
    run, outer = _merged(steps)
    if not outer:
        return ":" if (start, run) == (0, length) else f"{start}..{start + run}" if run != 1 else str(start)
    text = f"{start}..{start + run}" if run > 1 else str(start)
    return text + "".join(f" every {stride} ({n} times)" for stride, n in reversed(outer))


def _merged(steps: Iterable[Step]) -> tuple[int, list[Step]]:
    """A contiguous run, and the steps at which it stands again, the smallest first."""
    run, outer = 1, list[Step]()
    for stride, n in sorted(step for step in steps if step[1] > 1):
        if not outer and stride == run:
            run *= n
        elif outer and stride == outer[-1][0] * outer[-1][1]:
            outer[-1] = (outer[-1][0], outer[-1][1] * n)
        else:
            outer.append((stride, n))
    return run, outer


def _filled(expr: Expr, setting: Setting, at: Mapping[str, int]) -> str:
    match expr:
        case Dim():
            runs = setting.runs(expr.name, expr.cuts, setting.size(expr), at)
            return str(sum(count for _, count in runs))
        case Product(items=items, cuts=cuts):
            inner = [_filled(item, setting, at) for item in items]
            text = " × ".join(f"({t})" if " + " in t else t for t in inner)
        case Concat(parts=parts, cuts=cuts):
            text = " + ".join(_filled(part, setting, at) for part in parts)
        case Pad():
            return "padding"
        case _:
            return "…"
    return f"({text}){_ranks(cuts, setting)}" if cuts else text


def _ranks(cuts: tuple[Cut, ...], setting: Setting) -> str:
    return "".join(f"/{setting.degree(cut.axis)}" for cut in cuts)
