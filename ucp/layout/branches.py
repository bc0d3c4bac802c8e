"""Branches of a layout: one choice of part in every concatenation. Each is one logical tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ucp.layout.expr import Concat, Cut, Dim, Every, Expr, Layout, Pad, Product, product
from ucp.layout.invalid import LayoutError

_MOST_WAYS = 4096


class Path(NamedTuple):
    """One way through an expression: the dims passed, outer to inner, and all cuts on the way."""

    dims: tuple[Dim, ...]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """The dims of one logical tensor, per dim of the source tensor and outer to inner, and what cuts it."""

    dims: tuple[tuple[Dim, ...], ...]
    cuts: tuple[Cut, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the dims in order, literals too, without ``1``."""
        return tuple(dim.name for group in self.dims for dim in group if dim.name != "1")

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that cut this branch; one that stands here twice is an error of the program."""
        return tuple(cut.axis for cut in self.cuts)

    @property
    def placed(self) -> frozenset[str]:
        """Names of dims that a placement cuts (``e@ep``)."""
        return frozenset(dim.name for group in self.dims for dim in group if any(cut.placed for cut in dim.cuts))


def branches_in(layout: Layout) -> tuple[Branch, ...]:
    """Branches of `layout` in order, row-major over its concatenations, without those through ``_``."""
    found = []
    if math.prod(map(_ways, layout.dims)) > _MOST_WAYS:
        raise LayoutError(f"more than {_MOST_WAYS} choices of parts in one layout", node=layout)
    for choice in itertools.product(*(list(paths(dim)) for dim in layout.dims)):
        way = [path for path in choice if path is not None]
        if len(way) == len(choice):
            found.append(Branch(tuple(path.dims for path in way), tuple(cut for path in way for cut in path.cuts)))
    return tuple(found)


branches = lru_cache(maxsize=4096)(branches_in)
"""`branches_in`, kept. Its nodes may be those of an equal layout elsewhere, so that `at` is not to be trusted."""


def _ways(expr: Expr) -> int:
    """How many ways there are through `expr`, padding included."""
    match expr:
        case Product(items=items):
            return math.prod(map(_ways, items))
        case Concat(parts=parts):
            return sum(map(_ways, parts))
    return 1


def paths(expr: Expr) -> Iterator[Path | None]:
    """All ways through `expr` in order; None for one through padding."""
    match expr:
        case Dim(cuts=cuts):
            yield Path((expr,), cuts)
        case Pad():
            yield None
        case Product(items=items, cuts=cuts):
            for choice in itertools.product(*(list(paths(item)) for item in items)):
                yield _joined(choice, cuts)
        case Concat(parts=parts, cuts=cuts):
            for part in parts:
                for path in paths(part):
                    yield _joined((path,), cuts)
        case Every():
            raise LayoutError("`*` stands in packs only", node=expr)


def _joined(choice: Sequence[Path | None], cuts: tuple[Cut, ...]) -> Path | None:
    way = [path for path in choice if path is not None]
    if len(way) < len(choice):
        return None
    return Path(tuple(dim for p in way for dim in p.dims), (*cuts, *(cut for p in way for cut in p.cuts)))


@lru_cache(maxsize=4096)
def axes(layout: Layout) -> tuple[str, ...]:
    """Every axis that cuts some part of `layout`, padding included, each once."""
    return tuple(dict.fromkeys(cut.axis for dim in layout.dims for cut in all_cuts(dim)))


def all_cuts(expr: Expr) -> Iterator[Cut]:
    """Every cut in `expr`, outer before inner."""
    match expr:
        case Dim(cuts=cuts):
            yield from cuts
        case Product(items=inner, cuts=cuts) | Concat(parts=inner, cuts=cuts):
            yield from cuts
            for item in inner:
                yield from all_cuts(item)
        case Every(item=item):
            yield from all_cuts(item)
        case Pad():
            return


@lru_cache(maxsize=4096)
def default_targets(source: Layout) -> tuple[Layout, ...]:
    """What stands on the right where a program leaves it out: each branch's dims in left order, without cuts."""
    return tuple(
        Layout(tuple(product(tuple(Dim(dim.name) for dim in group)) for group in branch.dims), source.dtype)
        for branch in branches(source)
    )


def without_dims(
    source: Layout, targets: Sequence[Layout], lacking: Sequence[int]
) -> tuple[Layout, tuple[Layout, ...], tuple[int, ...]]:
    """The equation of a factored state, which lacks some dims of the source tensor (negative: from the last).

    Dims of the lacking ones vanish from the targets too, and target dims that are left empty. The third item says
    which branch of the new source layout each target is: two that differed in a lacking dim only are the same one.
    """
    count = len(source.dims)
    gone = {_dim_number(dim, count, source) for dim in lacking}
    kept = [dim for dim in range(count) if dim not in gone]
    ways = [len([path for path in paths(dim) if path is not None]) for dim in source.dims]
    parts = []
    for choice in itertools.product(*(range(n) for n in ways)):
        part = 0
        for dim in kept:
            part = part * ways[dim] + choice[dim]
        parts.append(part)
    before = branches(source)
    if len(before) != len(targets):
        raise LayoutError(f"{len(before)} parts on the left, {len(targets)} tensors on the right", node=source)
    names = [{dim.name for k in gone for dim in branch.dims[k]} for branch in before]
    rest = tuple(_without(target, lost) for target, lost in zip(targets, names, strict=True))
    return Layout(tuple(source.dims[dim] for dim in kept), source.dtype, source.at), rest, tuple(parts)


def _dim_number(dim: int, count: int, source: Layout) -> int:
    if not -count <= dim < count:
        raise LayoutError(f"there is no dim {dim} in a tensor of {count}", node=source)
    return dim % count


def _without(target: Layout, lost: set[str]) -> Layout:
    dims: list[Expr] = []
    for dim in target.dims:
        items = target_dims(dim)
        left = tuple(item for item in items if item.name not in lost)
        if left or not items:
            dims.append(dim if len(left) == len(items) else product(left))
    return Layout(tuple(dims), target.dtype, target.at)


def target_dims(expr: Expr) -> tuple[Dim, ...]:
    """The dims of one dim of a logical tensor, outer to inner. LayoutError for a cut, a part or padding there."""
    match expr:
        case Dim(cuts=()):
            return (expr,)
        case Product(items=items, cuts=()):
            return tuple(dim for item in items for dim in target_dims(item))
    what = "padding" if isinstance(expr, Pad) else "a concatenation" if isinstance(expr, Concat) else "a cut"
    raise LayoutError(f"a logical tensor is whole: {what} cannot stand on this side", node=expr)
