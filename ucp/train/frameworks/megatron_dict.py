"""Dicts of `sharded_state_dict()`, as ``dist_checkpointing`` saves and loads them, taken apart.

After a load such a dict holds what ``dist_checkpointing.load`` would have returned: tensors in place of sharded tensors
and factories, objects in place of sharded objects (megatron/core/dist_checkpointing/serialization.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ucp.errors import ConflictError, FitError
from ucp.layout import Box
from ucp.train.frameworks.megatron_items import Objects, Rest, Sharded
from ucp.train.frameworks.megatron_places import FLAT, Spot, add_spots, kind_of, named, spots

if TYPE_CHECKING:
    from ucp.train.targets import Targets

SHARDING = "param_state_sharding_type"
"""Key in every dict that a distributed optimizer makes of itself."""

Part = tuple[tuple[Any, ...], Any, Any]
"""A path, what is there, and what holds it."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A sharded part of a nested dict, at `path`, in `holder`."""

    path: tuple[Any, ...]
    value: Any
    holder: Any

    def put(self, value: Any) -> None:
        """Set what is there."""
        self.holder[self.path[-1]] = value


def take_leaves(
    found: Targets,
    leaves: Sequence[Leaf],
    rest: Sequence[Part],
    root: Any,
    trained: set[int],
    extra: Sequence[Sharded] = (),
) -> None:
    """Everything in the dicts, which are parts of `root`, and `extra` objects.

    Low-precision weights derive from fp32 values where the dicts have these, or an optimizer that `trained` them (ids).
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    objects = [leaf for leaf in leaves if isinstance(leaf.value, ShardedObject)]
    local = [leaf for leaf in leaves if isinstance(leaf.value, LocalNonpersistentObject)]
    tensors = [leaf for leaf in leaves if not isinstance(leaf.value, ShardedObject | LocalNonpersistentObject)]
    if objects or extra:
        found.add_item(Objects([*(sharded_object(leaf.value, leaf.put) for leaf in objects), *extra]))
    if kept := [part for part in rest if not _is_elsewhere(part)]:
        found.add_item(Rest(root, kept))
    _take_tensors(found, tensors, trained, len(kept) < len(rest))
    for leaf in local:
        found.after.append(_putting(leaf, leaf.value.unwrap))


def sharded_object(one: Any, put: Callable[[Any], None]) -> Sharded:
    """A ``ShardedObject``, which `put` sets."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    return Sharded(one.unique_key, one.data, bool(is_main_replica(one.replica_id)), put)


def _is_elsewhere(part: Part) -> bool:
    path, value, _ = part
    return path[-1] == "param_state" and value is None


def _take_tensors(found: Targets, leaves: Sequence[Leaf], trained: set[int], elsewhere: bool) -> None:
    """Sharded tensors and factories.

    `elsewhere`: another data-parallel rank has gathered this one's optimizer states
    (``distrib_optim_fully_reshardable_mem_efficient``), and so stores the values of the weights.
    """
    known = {leaf.path: spots(leaf.value) for leaf in leaves}
    masters: dict[tuple[str, Box], Spot] = {}
    for leaf in leaves:
        if _is_optimizer(leaf):
            masters |= {(spot.name, spot.region): spot for spot in known[leaf.path] if spot.state == "value"}
    mastered = {name for name, _ in masters}
    for leaf in leaves:
        here = known[leaf.path]
        if _is_optimizer(leaf) or not any(spot.name in mastered for spot in here):
            derived = id(leaf.value.data) in trained or (elsewhere and _is_low_replica(leaf.value))
            if not derived:
                _take_spots(found, leaf, here)
        else:
            for spot in here:
                if (spot.name, spot.region) not in masters:
                    raise FitError(f"{spot.name}: this rank has a part of its fp32 values only")
                master = masters[spot.name, spot.region]
                found.checks.append(partial(_check_master, spot, master))
                found.after.append(_copying(spot.tensor, master.tensor))
        found.after.append(_putting(leaf, partial(_whole, leaf.value, here)))


def _is_optimizer(leaf: Leaf) -> bool:
    return bool(named(leaf.value.key)[0] != leaf.value.key)


def _is_low_replica(value: Any) -> bool:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    low: bool = value.data.dtype in (torch.bfloat16, torch.float16)
    return low and not bool(is_main_replica(value.replica_id))


def _take_spots(found: Targets, leaf: Leaf, here: Sequence[Spot]) -> None:
    flat = FLAT.match(leaf.value.key) is not None
    kind = "buffer" if flat else "parameter" if _is_optimizer(leaf) else kind_of(leaf.value.data)
    add_spots(found, here, leaf.value.data, kind)


def _putting(leaf: Leaf, value: Callable[[], Any]) -> Callable[[], None]:
    return lambda: leaf.put(value())


def _check_master(spot: Spot, master: Spot) -> None:
    """ConflictError where weights are not the fp32 values rounded: saving these alone would lose the weights.

    Megatron-Core 0.16.1 gives wrong values for ``fully_reshardable`` where buckets of gradients have padding between
    them (`sharded_param_state_fully_reshardable` in megatron/core/optimizer/distrib_optimizer.py).
    """
    if not torch.equal(master.tensor.to(spot.tensor.dtype), spot.tensor):
        raise ConflictError(
            f"{spot.name}: the fp32 values in the optimizer's dict are not those of the weights",
            hint="give the optimizer itself; under --overlap-param-gather gather the weights before saving",
        )


def _copying(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        target.copy_(source)

    return copy


def _whole(value: Any, here: Sequence[Spot]) -> Any:
    """What takes the place of a sharded tensor: its data, put together where a factory's parts are copies of it."""
    if not hasattr(value, "merge_fn") or all(_in_place(value.data, spot.tensor) for spot in here):
        return value.data
    filled = iter(here)
    merged = value.merge_fn(_replaced(value.build(), filled))
    with torch.no_grad():
        value.data.copy_(merged.view_as(value.data))
    return value.data


def _in_place(whole: torch.Tensor, part: torch.Tensor) -> bool:
    return whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def _replaced(tree: Any, filled: Any) -> Any:
    """The dict that a factory made, with the tensors that were filled in place of its sharded ones."""
    if isinstance(tree, Mapping):
        return {key: _replaced(one, filled) for key, one in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replaced(one, filled) for one in tree]
    return next(filled).tensor if hasattr(tree, "global_shape") else tree
