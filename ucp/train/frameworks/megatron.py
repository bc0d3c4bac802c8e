"""Megatron-Core: model chunks, optimizers and dicts of `sharded_state_dict()`, as boxes of the tensors that they store.

Tensors are called as in ``torch_dist`` checkpoints: layers stacked, ``decoder.layers.mlp.linear_fc2.weight`` of shape
[layers, hidden, ffn], and optimizer states under the names of their parameters. Values are the fp32 ones where an
optimizer keeps them; the weights derive from these. Keys: ``ShardedTensor.key`` in megatron/core/dist_checkpointing.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ucp.errors import FitError, UsageError
from ucp.train.frameworks.megatron_dict import SHARDING, Leaf, sharded_object, take_leaves
from ucp.train.frameworks.megatron_items import Arguments, LossScale, Schedule, Sharded
from ucp.train.frameworks.megatron_mesh import mesh_of_job
from ucp.train.frameworks.megatron_optimizer import Master, chained, masters, refresher
from ucp.train.frameworks.megatron_places import (
    add_spots,
    ask,
    by_name,
    clear_padding,
    flat_part,
    kind_of,
    leaves,
    spots,
    whole_held,
)
from ucp.train.frameworks.megatron_rng import Tracker
from ucp.train.items import item_of

if TYPE_CHECKING:
    from ucp.train.targets import Targets

Path = tuple[Any, ...]


@dataclass(slots=True)
class _Found:
    """What of a target is Megatron-Core's, and `others`: (path, value, what holds it, under which key)."""

    chunks: list[Any] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    trackers: list[Any] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    others: list[tuple[Path, Any, Any]] = field(default_factory=list)


def take(found: Targets, value: Any) -> bool:
    """Whether there is anything of Megatron-Core in `value`; then all of it is taken.

    FitError for a parameter of an optimizer that no model chunk names, and for optimizers of unknown memory.
    """
    if not _has(value):
        return False
    mine = _Found()
    _sort(mine, value, (), None)
    if (mesh := mesh_of_job()) is not None:
        found.meshes.append(mesh)
    optimizers = [one for optimizer in mine.optimizers for one in chained(optimizer)]
    dicts = [(chunk, chunk.sharded_state_dict()) for chunk in _chunks(mine, optimizers)]
    entries = list(_entries([*(leaf.value for leaf in mine.leaves), *leaves([held for _, held in dicts])]))
    found.after.append(lambda: _clearing(found))
    trained = _take_optimizers(found, optimizers, entries)
    for entry in entries if mine.chunks else ():
        if id(entry.data) not in trained:
            add_spots(found, spots(entry), entry.data, kind_of(entry.data))
            found.refusals.append(partial(_refuse_copy, entry))
    for scheduler in mine.schedulers:
        found.add_item(Schedule(scheduler))
    for tracker in mine.trackers:
        found.add_item(Tracker(tracker))
    if scalers := [one.grad_scaler for one in optimizers if getattr(one, "grad_scaler", None)]:
        found.add_item(LossScale(scalers))
    extra = [one for chunk, held in dicts if mine.chunks for one in _extra_states(chunk, held)]
    _take_dicts(found, mine, value, trained, extra)
    return True


def _take_dicts(found: Targets, mine: _Found, root: Any, trained: set[int], extra: list[Sharded]) -> None:
    """Dicts of `sharded_state_dict()`, and whatever else there is."""
    told = [leaf.path for leaf in mine.leaves] + [path for path, _, _ in mine.others if path and path[-1] == SHARDING]
    inside = {path[0] for path in told if len(path) > 1}
    rest = [other for other in mine.others if len(other[0]) > 1 and other[0][0] in inside]
    take_leaves(found, mine.leaves, rest, root, trained, extra)
    for path, other, holder in mine.others:
        if len(path) < 2 or path[0] not in inside:
            _take_other(found, path, other, holder)


def _has(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        return (isinstance(value, Mapping) and SHARDING in value) or any(_has(one) for one in parts)
    return isinstance(value, _kinds())


def _kinds() -> tuple[type, ...]:
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.module import MegatronModule

    sharded = ShardedBase, LocalNonpersistentObject
    return MegatronModule, MegatronOptimizer, OptimizerParamScheduler, CudaRNGStatesTracker, *sharded


def _sort(mine: _Found, value: Any, path: Path, holder: Any) -> None:
    module, optimizer, scheduler, tracker, sharded, local = _kinds()
    if isinstance(value, module):
        mine.chunks.append(_unwrapped(value))
    elif isinstance(value, optimizer):
        mine.optimizers.append(value)
    elif isinstance(value, scheduler):
        mine.schedulers.append(value)
    elif isinstance(value, tracker):
        mine.trackers.append(value)
    elif isinstance(value, sharded | local):
        mine.leaves.append(Leaf(path, value, holder))
    elif isinstance(value, Mapping | list | tuple) and (not path or _has(value)):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            _sort(mine, one, (*path, key), value)
    else:
        mine.others.append((path, value, holder))


def _unwrapped(chunk: Any) -> Any:
    """The model in Megatron-Core's wrappers, which do not take part in names."""
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel
    from megatron.core.transformer.module import Float16Module

    while isinstance(chunk, _BaseDataParallel | Float16Module):
        chunk = chunk.module
    return chunk


def _take_other(found: Targets, path: Path, value: Any, holder: Any) -> None:
    """What is not Megatron-Core's, as it is taken anywhere."""
    from ucp.train import targets

    key = path[-1] if path else None
    name = key if isinstance(key, str) else ""
    if isinstance(value, Namespace):
        found.add_item(Arguments(value, holder, key))
    elif not found.add_item(item_of(name, value, holder=holder, key=key)):
        targets.take_value(found, {name: value} if name else value)


def _take_optimizers(found: Targets, optimizers: list[Any], entries: list[Any]) -> set[int]:
    """Values and states that optimizers keep; the ids of the model's parameters whose values these are."""
    known = {id(entry.data): entry for entry in entries}
    trained: set[int] = set()
    for master in (master for optimizer in optimizers for master in masters(optimizer)):
        trained.add(id(master.parameter))
        if id(master.parameter) not in known:
            shape = list(master.parameter.shape)
            raise FitError(
                f"the optimizer trains a parameter of shape {shape} that no model given has", hint="give its model, too"
            )
        _add_master(found, master, known[id(master.parameter)])
    if optimizers:
        found.optimizers += [optimizer.optimizer for optimizer in optimizers]
        found.after.append(refresher(optimizers))
    # Of parameters that other data-parallel ranks train wholly, this one has weights that derive from theirs.
    return trained | {id(parameter) for optimizer in optimizers for parameter in _shared(optimizer)}


def _chunks(mine: _Found, optimizers: list[Any]) -> list[Any]:
    """The model's chunks; those that the optimizer knows of where no model is given."""
    known = [_unwrapped(chunk) for one in optimizers for chunk in getattr(one, "model_chunks", ())]
    return list(dict.fromkeys(mine.chunks or (() if mine.leaves else known)))


def _entries(listed: Iterable[Any]) -> Iterator[Any]:
    """Tensors of the model as its `sharded_state_dict` has them, factories not built."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in listed:
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None:
            yield entry


def _extra_states(chunk: Any, held: Mapping[str, Any]) -> Iterator[Sharded]:
    """What layers keep beside tensors, such as scales of FP8: objects of a chunk's `sharded_state_dict`."""
    for path, one in held.items():
        if hasattr(one, "unique_key") and one.data is not None:
            layer = chunk.get_submodule(path.removesuffix("_extra_state").removesuffix("."))
            yield sharded_object(one, layer.set_extra_state)


def _shared(optimizer: Any) -> Iterator[torch.Tensor]:
    """All parameters whose values the data-parallel ranks of a distributed optimizer keep together."""
    for buffer in getattr(optimizer, "buffers", ()):
        yield from buffer.params


def _add_master(found: Targets, master: Master, entry: Any) -> None:
    main, local = master.main, tuple(master.parameter.shape)
    here = spots(entry)
    if any(spot.local is None for spot in here):
        raise FitError(
            f"{here[0].name}: is no part of the parameter's memory as it lies",
            hint="give optimizer.sharded_state_dict(...) instead of the optimizer",
        )
    memory, kind, start = main.detach(), kind_of(master.parameter), master.start
    for same in by_name(here):
        if start is None:
            ask(found, same, main, kind, partial(whole_held, memory, same))
        else:
            ask(found, same, main, kind, partial(flat_part, memory, start, local, same))


def _refuse_copy(entry: Any) -> None:
    """UsageError for a weight that a live optimizer overwrites in its next step with the fp32 value that it keeps.

    Optimizers name that value ``main_param``: megatron/core/optimizer/optimizer.py and distrib_optimizer.py.
    """
    if getattr(entry.data, "main_param", None) is not None:
        raise UsageError(
            f"{entry.key}: an optimizer keeps an fp32 value of it, with which the next step would undo the load",
            hint="give the optimizer as well: ucp.load((model, optimizer), ...)",
        )


def _clearing(found: Targets) -> None:
    """Padding of vocabularies is zero, in values and states, where a checkpoint has less of it than the job."""
    for slot in found.slots:
        if slot.resize is None or slot.placed is None:
            continue
        clear_padding(slot.placed)
        for optimizer in found.optimizers:
            for state in optimizer.state.get(slot.tensor, {}).values():
                if isinstance(state, torch.Tensor) and state.shape == slot.placed.memory.shape:
                    clear_padding(slot.placed.of(state))
