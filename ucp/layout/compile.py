"""Equations at a mesh: which blocks of which logical tensors one coordinate holds.

A source layout says how one tensor lies at each coordinate; its branches are the logical tensors. This compiles one
coordinate of it. Work and result grow with the number of blocks, never with the number of elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ucp.errors import FitError
from ucp.layout.block import NO_STEP, Block, View
from ucp.layout.branches import Branch, axes, branches, target_dims
from ucp.layout.expr import Cut, Dim, Layout
from ucp.layout.invalid import LayoutError
from ucp.layout.pads import Pads, count_pads, smallest
from ucp.layout.pieces import Content, Holder, Piece, content
from ucp.layout.region import Box, Shape
from ucp.layout.setting import Setting, check_count

__all__ = ["Compiled", "LayoutError", "Placed", "Setting", "compile_layout", "globalize", "local_shape"]

Names = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A block of the logical tensor that has the values `names` in its name."""

    block: Block
    names: Names = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one coordinate holds: `shape` of its shard with padding, and per target the view and the blocks."""

    shape: Shape
    views: tuple[View, ...]
    blocks: tuple[tuple[Placed, ...], ...]


def compile_layout(
    source: Layout,
    targets: Sequence[Layout],
    *,
    setting: Setting,
    coordinate: Mapping[str, int],
    fixed: Mapping[str, int] | None = None,
    captured: Sequence[frozenset[str]] = (),
    pad: Pads | None = None,
    parts: Sequence[int] | None = None,
) -> Compiled:
    """Blocks of each of `targets` that the tensor with the layout `source` holds at `coordinate`.

    `coordinate` needs an index on every axis that cuts the tensor, unless the axis has one rank. `fixed` are GLOBAL
    values of leaves that the name of the source tensor or its coordinate fixes; every target must have each of them,
    apart from axes, which a target has only where its tensors differ along them. ``captured[k]`` are the leaves in the
    name of target k, fixed or dims of the source. `pad` are the sizes of the padding; without it the smallest that
    fits. `parts` says which branch of the source each target is (without it: the branches in order).

    LayoutError where the equation makes no sense at any mesh, FitError where sizes, cuts or mesh do not fit it.
    """
    fixed = fixed or {}
    plan = _compiled(
        source,
        tuple(targets),
        setting,
        tuple((axis, setting.index(axis, coordinate)) for axis in axes(source)),
        frozenset(fixed),
        tuple(captured) or (frozenset(),) * len(targets),
        None if pad is None else tuple(sorted(pad.items())),
        tuple(range(len(targets))) if parts is None else tuple(parts),
    )
    if not fixed:
        return Compiled(plan.shape, plan.views, tuple(target.blocks for target in plan.targets))
    for name, value in fixed.items():
        if not 0 <= value < setting.number(name):
            raise FitError(f"`{name}` is {value}, but its size is {setting.number(name)}")
    return Compiled(plan.shape, plan.views, tuple(_with_fixed(target, fixed) for target in plan.targets))


def local_shape(layout: Layout, setting: Setting, coordinate: Mapping[str, int], *, pad: Pads | None = None) -> Shape:
    """Shape of the shard of a tensor with `layout` at `coordinate`, padding included."""
    return tuple(item.length for item in _contents(layout, setting, coordinate, pad))


def globalize(name: str, cuts: Sequence[Cut], local: int, setting: Setting, coordinate: Mapping[str, int]) -> int:
    """Global number that the `local` number in a name means at `coordinate`: ``{l/vpp/pp}``.

    FitError where the coordinate does not hold so many.
    """
    runs = setting.runs(name, cuts, setting.size(Dim(name)), coordinate)
    passed = 0
    for start, count in runs:
        if passed <= local < passed + count:
            return start + local - passed
        passed += count
    where = " ".join(f"{cut.axis}{setting.index(cut.axis, coordinate)}" for cut in cuts)
    raise FitError(f"`{name}` {local} is not among the {passed} that {where or 'the source'} holds")


@dataclass(frozen=True, slots=True)
class _Target:
    """Blocks of one target, in which the fixed leaves are still 0, and where those go."""

    blocks: tuple[Placed, ...]
    slots: tuple[tuple[int, str], ...]
    """Factor of the view, and the fixed leaf whose value is its index."""
    named: tuple[str, ...]
    """Fixed leaves in the target's name."""


@dataclass(frozen=True, slots=True)
class _Plan:
    shape: Shape
    views: tuple[View, ...]
    targets: tuple[_Target, ...]


@lru_cache(maxsize=16384)
def _compiled(
    source: Layout,
    targets: tuple[Layout, ...],
    setting: Setting,
    coordinate: tuple[tuple[str, int], ...],
    fixed: frozenset[str],
    captured: tuple[frozenset[str], ...],
    pad: tuple[tuple[tuple[int, int], int], ...] | None,
    parts: tuple[int, ...],
) -> _Plan:
    found = branches(source)
    if parts == tuple(range(len(targets))) and len(found) != len(targets):
        raise LayoutError(f"{len(found)} parts on the left, {len(targets)} tensors on the right", node=source)
    contents = _contents(source, setting, dict(coordinate), None if pad is None else dict(pad))
    held = [way for way in itertools.product(*(item.branches for item in contents)) if None not in way]
    ranks = frozenset(axis for axis, _ in setting.mesh.axes)
    views, plans = [], []
    for target, part, names in zip(targets, parts, captured, strict=True):
        dims = [target_dims(dim) for dim in target.dims]
        _check_leaves(found[part], target, dims, fixed, names, ranks)
        views.append(View(tuple(tuple(setting.size(dim) for dim in group) for group in dims)))
        leaves = [dim.name for group in dims for dim in group]
        pieces = [pieces for pieces in held[part] if pieces is not None]
        blocks = _blocks(pieces, leaves, sorted(names - fixed))
        slots = tuple((i, leaf) for i, leaf in enumerate(leaves) if leaf in fixed)
        plans.append(_Target(tuple(blocks), slots, tuple(sorted(names & fixed))))
    return _Plan(tuple(item.length for item in contents), tuple(views), tuple(plans))


def _contents(layout: Layout, setting: Setting, coordinate: Mapping[str, int], pad: Pads | None) -> list[Content]:
    found = []
    for number, dim in enumerate(layout.dims):
        count = count_pads(dim)
        if pad is None:
            sizes = smallest(dim, setting, coordinate) if count else []
        else:
            sizes = [pad[number, k] for k in range(count)]
        found.append(content(dim, Holder(setting, coordinate, iter(sizes))))
    return found


def _check_leaves(
    branch: Branch,
    target: Layout,
    dims: Sequence[tuple[Dim, ...]],
    fixed: frozenset[str],
    captured: frozenset[str],
    ranks: frozenset[str],
) -> None:
    """Both sides must hold the same leaves, each once; an axis may cut a branch once. `ranks` are axes."""
    for axis, cut in zip(branch.axes, branch.cuts, strict=True):
        if branch.axes.count(axis) > 1:
            raise LayoutError(f"axis `{axis}` cuts the same tensor twice", node=cut)
    right = [dim.name for group in dims for dim in group if dim.name != "1"] + sorted(captured)
    left = [*branch.leaves, *(name for name in sorted(fixed) if name in right or name not in ranks)]
    for side, names, others in (("left", left, right), ("right", right, left)):
        for name in names:
            if names.count(name) > 1:
                hint = f"give one of them another name: `let {name}2 = {name}`"
                raise LayoutError(f"`{name}` stands twice on the {side}", node=target, hint=hint)
            if name not in others:
                raise LayoutError(f"`{name}` is only on the {side}", node=target)


def _blocks(pieces: Sequence[Sequence[Piece]], leaves: Sequence[str], named: Sequence[str]) -> Iterator[Placed]:
    for choice in itertools.product(*pieces):
        start = tuple(piece.offset for piece in choice)
        where = {leaf.name: (dim, leaf) for dim, piece in enumerate(choice) for leaf in piece.leaves}
        spans, steps = [], []
        for name in leaves:
            dim, leaf = where.get(name, (-1, None))
            spans.append((leaf.start, leaf.size) if leaf else (0, 1))
            steps.append((dim, leaf.stride) if leaf and leaf.size > 1 else NO_STEP)
        box = Box(tuple(a for a, _ in spans), tuple(n for _, n in spans))
        block = Block(box, start, tuple(steps))
        if not named:
            yield Placed(block)
            continue
        stacked = [where[name] for name in named]
        check_count(math.prod(leaf.size for _, leaf in stacked), " x ".join(named))
        for values in itertools.product(*(range(leaf.size) for _, leaf in stacked)):
            moved = list(start)
            for value, (dim, leaf) in zip(values, stacked, strict=True):
                moved[dim] += value * leaf.stride
            names = tuple((leaf.name, leaf.start + value) for value, (_, leaf) in zip(values, stacked, strict=True))
            yield Placed(Block(box, tuple(moved), block.steps), names)


def _with_fixed(target: _Target, fixed: Mapping[str, int]) -> tuple[Placed, ...]:
    """The blocks of `target` with the values of `fixed` in their boxes and names."""
    if not target.slots and not target.named:
        return target.blocks
    values = tuple((name, fixed[name]) for name in target.named)
    found = []
    for placed in target.blocks:
        start = list(placed.block.box.start)
        for factor, leaf in target.slots:
            start[factor] = fixed[leaf]
        block = Block(Box(tuple(start), placed.block.box.shape), placed.block.start, placed.block.steps)
        found.append(Placed(block, tuple(sorted((*placed.names, *values)))))
    return tuple(found)
