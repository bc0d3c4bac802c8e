"""Where Megatron-Core's sharded tensors lie: boxes of stored tensors, in the memory of a rank's own parameter.

A parameter's `sharded_state_dict` entry is a ``ShardedTensor``, one box, or a ``ShardedTensorFactory`` that cuts it in
several, such as the two halves of a gated MLP (megatron/core/dist_checkpointing/mapping.py; transformer/mlp.py). Axes
of layers and experts are prepended: the box has them and the memory has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ucp.catalog import Kind
from ucp.errors import FitError
from ucp.layout import Box, FlatRange, Shape
from ucp.layout.region import ravel
from ucp.train.held import Held, Place
from ucp.train.shards import local_tensor

if TYPE_CHECKING:
    from ucp.train.targets import Targets

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_MASTERS = ("param", "fp32_param")
"""States that are the fp32 values: of the distributed optimizer, and of others (megatron/core/optimizer)."""

FLAT = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_")
"""Starts of keys of the distributed optimizer's own buffers, under ``dp_reshardable``."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One box of a stored tensor: `region` of the tensor of `shape` that is called `name`, in box `local` of a rank's.

    `local` has no prepended axes; it is None where the memory is laid out in another way than the parameter, and
    `tensor` alone is what the box holds. `flexible` tensors may have other sizes in a checkpoint: padded vocabularies.
    """

    name: str
    state: str
    shape: Shape
    region: Box
    tensor: torch.Tensor
    local: Box | None
    flexible: bool


def named(key: str) -> tuple[str, str]:
    """Name and state of a stored tensor: an optimizer's are those of the parameter."""
    found = _STATE.fullmatch(key)
    if found is None:
        return key, "value"
    return found[2], "value" if found[1] in _MASTERS else found[1]


def built(base: Any) -> list[Any]:
    """The sharded tensors of a `sharded_state_dict` entry, those that a factory makes of it among them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(base, ShardedTensorFactory):
        return [one for one in leaves(base.build()) if isinstance(one, ShardedTensor)]
    return [base]


def leaves(tree: Any) -> Iterator[Any]:
    """What lies in nested dicts and lists."""
    if isinstance(tree, dict | list | tuple):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(one)
    else:
        yield tree


def spots(base: Any) -> list[Spot]:
    """The boxes of a `sharded_state_dict` entry. FitError for one without data, or flattened as before 0.14."""
    found = []
    for sharded in built(base):
        name, state = named(sharded.key)
        if sharded.data is None or sharded.flattened_range is not None:
            told = "no data" if sharded.data is None else "a flattened range"
            raise FitError(f"{sharded.key}: has {told}, and cannot be saved or filled")
        memory = local_tensor(sharded.data, sharded.key)
        region = Box(tuple(sharded.global_offset), (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape))
        if not region.within(tuple(sharded.global_shape)):
            raise FitError(f"{sharded.key}: {region} is not in {list(sharded.global_shape)}")
        local = _box_in(local_tensor(base.data, base.key), memory)
        shape, flexible = tuple(sharded.global_shape), bool(sharded.allow_shape_mismatch)
        found.append(Spot(name, state, shape, region, memory, local, flexible))
    return found


def _box_in(whole: torch.Tensor, part: torch.Tensor) -> Box | None:
    """The box of `whole` that `part`, a view of it, is; None where it is no box of it."""
    same = whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    if not same or whole.ndim != part.ndim or whole.dtype != part.dtype:
        return None
    if any(n > 1 and a != b for n, a, b in zip(part.shape, whole.stride(), part.stride(), strict=True)):
        return None
    at, start = int(part.storage_offset()) - int(whole.storage_offset()), [0] * whole.ndim
    strides = whole.stride()
    for dim in sorted(range(whole.ndim), key=lambda dim: -strides[dim]):
        start[dim], at = divmod(at, strides[dim]) if strides[dim] else (0, at)
    box = Box(tuple(start), tuple(part.shape))
    return box if at == 0 and box.within(tuple(whole.shape)) else None


def kind_of(tensor: Any) -> Kind:
    """What a model's tensor is: buffers are no parameters."""
    if not isinstance(tensor, nn.Parameter):
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def add_spots(found: Targets, here: Sequence[Spot], tensor: torch.Tensor, kind: Kind) -> None:
    """Ask for all boxes `here` of one entry, which lie in `tensor`, or in memory of their own each."""
    if any(spot.local is None for spot in here):
        for spot in here:
            _add(found, [replace(spot, local=Box.whole(tuple(spot.tensor.shape)))], spot.tensor, kind)
        return
    for same in by_name(here):
        _add(found, same, tensor, kind)


def _add(found: Targets, same: Sequence[Spot], tensor: torch.Tensor, kind: Kind) -> None:
    memory = local_tensor(tensor, same[0].name)
    ask(found, same, tensor, kind, lambda shape: whole_held(memory, same, shape))


def ask(
    found: Targets, same: Sequence[Spot], tensor: torch.Tensor, kind: Kind, placed: Callable[[Shape], Held]
) -> None:
    """Ask for boxes of one tensor, which `placed` finds in memory for a given shape of the whole."""
    first = same[0]
    resize = (lambda shape: _resized(first.shape, shape, placed)) if any(spot.flexible for spot in same) else None
    found.add(first.name, first.state, tensor, placed=placed(first.shape), kind=kind, resize=resize)


def _resized(own: Shape, shape: Shape, placed: Callable[[Shape], Held]) -> Held | None:
    """Padding is at the end of the first dim; None where others differ."""
    return placed(shape) if len(own) == len(shape) and own[1:] == shape[1:] else None


def by_name(here: Iterable[Spot]) -> list[list[Spot]]:
    """Boxes of the same tensor together."""
    found: dict[tuple[str, Shape], list[Spot]] = {}
    for spot in here:
        found.setdefault((spot.name, spot.shape), []).append(spot)
    return list(found.values())


def whole_held(memory: torch.Tensor, found: Sequence[Spot], shape: Shape) -> Held:
    """What a rank holds in `memory`, which is shaped as its parameter, of the tensor of `shape` whose `found` are."""
    places = []
    for spot in found:
        clipped = spot.region.intersect(Box.whole(shape))
        if clipped is not None and spot.local is not None:
            places.append(Place(clipped, Box(spot.local.start, clipped.shape[len(shape) - len(spot.local.shape) :])))
    return Held(shape, memory, tuple(places))


def clear_padding(held: Held) -> None:
    """Zeros in what of the memory is in no place."""
    if sum(place.region.size for place in held.places) < held.memory.numel():
        rest = torch.ones_like(held.memory, dtype=torch.bool)
        for _, view in held.of(rest).views():
            view.fill_(False)
        held.memory.masked_fill_(rest, 0)


def flat_part(memory: torch.Tensor, start: int, local: Shape, found: Sequence[Spot], shape: Shape) -> Held:
    """The same of 1-D `memory` that holds the elements from `start` on of a parameter of shape `local`."""
    places: list[Place] = []
    at = 0
    for box in FlatRange(start, memory.numel()).boxes(local):
        for spot in found:
            places += _flat_places(box, at, spot, shape)
        at += box.size
    return Held(shape, memory, tuple(places))


def _flat_places(box: Box, at: int, spot: Spot, shape: Shape) -> Iterator[Place]:
    """What of `spot` lies in `box` of a parameter, whose elements are in flat memory from `at` on."""
    clipped = spot.region.intersect(Box.whole(shape))
    if clipped is None or spot.local is None:
        return
    extra = len(shape) - len(spot.local.shape)
    common = Box(spot.local.start, clipped.shape[extra:]).intersect(box)
    for run in _runs(common, box) if common is not None else ():
        inside = run.relative_to(spot.local.start)
        here = tuple(a + b for a, b in zip(clipped.start[extra:], inside.start, strict=True))
        region = Box(clipped.start[:extra] + here, (1,) * extra + run.shape)
        yield Place(region, at + ravel(run.relative_to(box.start).start, box.shape))


def _runs(part: Box, box: Box) -> Iterator[Box]:
    """Cut `part` of `box` into boxes whose elements follow each other in it."""
    if part.relative_to(box.start).flat(box.shape) is not None:
        yield part
        return
    dim = next(dim for dim, n in enumerate(part.shape) if n > 1)
    for number in range(part.shape[dim]):
        start = (*part.start[:dim], part.start[dim] + number, *part.start[dim + 1 :])
        yield from _runs(Box(start, (*part.shape[:dim], 1, *part.shape[dim + 1 :])), box)
