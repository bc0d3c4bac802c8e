"""Sub-parameters: parts of one parameter that lie one after the other and are each cut by themselves.

A client declares them by a view of the parameter with the parts' sizes at ``partition_dim``
(deepspeed/checkpoint/universal_checkpoint.py, ``SubparamShape``; pull request 5390 has the examples: experts fused as
``(experts, hidden_out, hidden_in)`` with dim 1 cut, and ``((q, k, v), hidden)`` with dim 0 cut). From version 0.4 of
the metadata on, ``sub_param_shard_widths`` tells each part's width on each rank, and DeepSpeed itself asks for it even
where an even cut is the only one; here parts that have none are cut evenly, or refused where they do not divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.errors import CorruptError, FitError
from ucp.layout import Shape, numel
from ucp.tree import Tree

from . import nodes
from .cuts import Along, fused


@dataclass(frozen=True, slots=True)
class Declaration:
    """A view of the whole parameter; a size of -1 follows from the others.

    A tuple at `dim` gives the parts' sizes. One number there is the size of the only part, or, in what AutoTP wrote
    before version 0.4, how many equal parts there are.
    """

    shape: tuple[int | tuple[int, ...], ...]
    dim: int

    @property
    def told(self) -> int | tuple[int, ...]:
        """What is said of the parts."""
        return self.shape[self.dim]

    @property
    def around(self) -> tuple[int, ...]:
        """Sizes of the other dims of the view."""
        return tuple(n for k, n in enumerate(self.shape) if k != self.dim and isinstance(n, int))


def halves(name: str, shapes: Sequence[Shape]) -> Along:
    """Two parts of the first dim, of which every rank has a half each (``parameter_with_2_sub_params_cat_dim_0``)."""
    if not all(shapes) or any(shape[0] % 2 for shape in shapes):
        raise FitError(f"{name}: shards of {_listed(shapes)} do not hold two halves")
    widths = [shape[0] // 2 for shape in shapes]
    return fused(0, [widths, widths])


def cut_of(declared: Declaration, name: str, shapes: Sequence[Shape], widths: Tree = None) -> Along:
    """How ranks that hold `shapes` of parameter `name` cut it; `widths` are recorded ones, by part and rank.

    CorruptError where view, widths and shapes contradict each other, FitError for what cannot be told.
    """
    recorded = None if widths is None else _recorded(name, widths, len(shapes))
    told = declared.told
    known = sum(map(sum, recorded)) if recorded else sum(told) if isinstance(told, tuple) else None
    if known is None and -1 in declared.around:
        return _counted(declared, name, shapes)
    outer, inner, total = _view(declared, name, sum(map(numel, shapes)), known)
    parts = recorded or [_even(name, size, len(shapes)) for size in _sizes(name, told, total)]
    held = [sum(part[rank] for part in parts) for rank in range(len(shapes))]
    dim, before, after = _dim_of(name, shapes, held, outer, inner)
    return fused(dim, parts, outer=before, inner=after)


def whole_view(declared: Declaration, name: str, shape: Shape, widths: Tree = None) -> tuple[Tree, ...]:
    """The view of the whole parameter of `shape`, with the sizes of the parts where the cut dim is."""
    recorded = None if widths is None else nodes.sequence(widths, name)
    parts = [sum(nodes.shape(part, name)) for part in recorded] if recorded else None
    if parts is None and not isinstance(declared.told, tuple) and -1 in declared.around:
        parts = list(_sizes(name, declared.told, shape[declared.dim] if len(shape) > declared.dim else 0))
    if parts is None:
        known = sum(declared.told) if isinstance(declared.told, tuple) else None
        parts = list(_sizes(name, declared.told, _view(declared, name, numel(shape), known)[2]))
    told = tuple(parts) if len(parts) > 1 else parts[0]
    return (*declared.shape[: declared.dim], told, *declared.shape[declared.dim + 1 :])


def _recorded(name: str, widths: Tree, ranks: int) -> list[tuple[int, ...]]:
    where = f"sub_param_shard_widths of {name}"
    parts = [nodes.shape(part, where) for part in nodes.sequence(widths, where)]
    if not parts or any(len(part) != ranks for part in parts):
        raise CorruptError(f"{where}: {parts} are not the widths of parts on {ranks} ranks")
    return parts


def _counted(declared: Declaration, name: str, shapes: Sequence[Shape]) -> Along:
    """A number of equal parts of the tensor's own dim, as in ``(3, -1)``."""
    dim = declared.dim
    if any(len(shape) <= dim for shape in shapes) or declared.told == -1 or not isinstance(declared.told, int):
        raise FitError(f"{name}: the view {list(declared.shape)} leaves more than one size open")
    sizes = _sizes(name, declared.told, sum(shape[dim] for shape in shapes))
    parts = [_even(name, size, len(shapes)) for size in sizes]
    if any(sum(part[rank] for part in parts) != shape[dim] for rank, shape in enumerate(shapes)):
        raise CorruptError(f"{name}: {len(parts)} equal parts of dim {dim} do not make up shards of {_listed(shapes)}")
    return fused(dim, parts)


def _even(name: str, size: int, ranks: int) -> tuple[int, ...]:
    if size % ranks:
        raise FitError(
            f"{name}: a sub-parameter of size {size} is cut unevenly over {ranks} ranks, with no widths recorded",
            hint="DeepSpeed records sub_param_shard_widths since version 0.4 of the metadata; or give program=",
        )
    return (size // ranks,) * ranks


def _sizes(name: str, told: int | tuple[int, ...], total: int) -> tuple[int, ...]:
    """Sizes of the parts over all ranks."""
    if isinstance(told, tuple):
        return told
    if told in (-1, total):
        return (total,)
    if told <= 0 or total % told:
        raise CorruptError(f"{name}: {told} equal sub-parameters do not make up {total}")
    return (total // told,) * told


def _view(declared: Declaration, name: str, elements: int, known: int | None) -> tuple[int, int, int]:
    """Elements of the view before and after the cut dim, and the size of that dim over all ranks."""
    around = list(declared.around)
    where = f"{name}: {elements} elements in a view {list(declared.shape)}"
    if around.count(-1) > 1 or any(n < -1 or n == 0 for n in around):
        raise FitError(f"{where}, which leaves more than one size open")
    if -1 in around:
        others = (known or 0) * math.prod(n for n in around if n != -1)
        if not others or elements % others:
            raise CorruptError(where)
        around[around.index(-1)] = elements // others
    if elements % math.prod(around) or known not in (None, elements // math.prod(around)):
        raise CorruptError(where)
    outer, inner = math.prod(around[: declared.dim]), math.prod(around[declared.dim :])
    return outer, inner, elements // math.prod(around)


def _dim_of(name: str, shapes: Sequence[Shape], held: Sequence[int], outer: int, inner: int) -> tuple[int, int, int]:
    """The dim of the tensor that the view's cut dim is in, and the elements before and after the cut inside it.

    `held` is what each rank has of the cut dim.
    """
    found: set[tuple[int, int, int]] | None = None
    for shape, size in zip(shapes, held, strict=True):
        if numel(shape) or size:
            here = set(_dims(shape, size, outer, inner)) if numel(shape) else set()
            found = here if found is None else found & here
    if not found:
        raise CorruptError(f"{name}: ranks with {list(held)} of the cut dim do not hold shards of {_listed(shapes)}")
    return min(found, key=lambda place: (place[1] * place[2], place))


def _dims(shape: Shape, size: int, outer: int, inner: int) -> Iterator[tuple[int, int, int]]:
    for dim in range(len(shape)):
        before, after = numel(shape[:dim]), numel(shape[dim + 1 :])
        if outer % before == 0 and inner % after == 0:
            around = (outer // before, inner // after)
            if around[0] * size * around[1] == shape[dim]:
                yield dim, *around


def _listed(shapes: Sequence[Shape]) -> str:
    return " and ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
