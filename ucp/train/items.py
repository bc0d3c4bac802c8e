"""Items: everything in a target that is no tensor of a model or an optimizer, found by what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ucp.train.state.item import Item, Prepared, World, by_rank, combined
from ucp.train.state.live import is_plain
from ucp.train.state.loader import ReshardableLoader
from ucp.train.state.per_rank import Own, PerRank
from ucp.train.state.rng import Rng, Streams
from ucp.train.state.sampler import Position, ReshardableSampler
from ucp.train.state.stateful import Scaler, Scheduler, Stateful, is_scaler, is_scheduler, is_stateful
from ucp.train.state.values import Holder, Value

_SCHEDULER, _SCALER, _RNG, _SAMPLER = "lr_scheduler", "loss_scale", "rng", "sampler"
"""Where catalogs keep them (`ucp.training`)."""

_SPELLINGS = {
    _SCHEDULER: frozenset({"", _SCHEDULER, "scheduler", "sched"}),
    _SCALER: frozenset({"", _SCALER, "scaler", "grad_scaler", "loss_scaler", "gradscaler", "amp"}),
    _RNG: frozenset({"", _RNG, "rng_state", "rng_states", "random", "random_state"}),
    _SAMPLER: frozenset({"", _SAMPLER, "loader", "dataloader", "data_loader"}),
}
"""What a job calls them when it means the only one there is."""

_LOADER_REMEDY = "ucp.ReshardableLoader(loader) with a ReshardableSampler has one place for all ranks and workers"
"""For torchdata's ``StatefulDataLoader`` as it is (torchdata/stateful_dataloader)."""


def item_of(name: str, value: Any, *, holder: Holder | None = None, key: Any = None) -> Item | None:
    """The item that `value` is, called `name` in the target; None for what is none, such as a module or a tensor.

    `holder` and `key` say where a plain value lies, ``holder[key]``, so that another can take its place. The item's
    own `name` is the one under which it is stored: `lr_scheduler`, `loss_scale`, `rng` and `sampler` for what goes by
    usual names of these.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, torch.Tensor | nn.Module | Optimizer):
        return None
    if isinstance(value, PerRank):
        return Own(name, value)
    if isinstance(value, Rng):
        return Streams(_stored(name, _RNG), value)
    if isinstance(value, ReshardableSampler | ReshardableLoader):
        sampler = value.sampler if isinstance(value, ReshardableLoader) else value
        return Position(_stored(name, _SAMPLER), sampler)
    if isinstance(value, DataLoader) and is_stateful(value):
        return Own(name or _SAMPLER, PerRank(value), _LOADER_REMEDY)
    if is_scaler(value):
        return Scaler(_stored(name, _SCALER), value)
    if is_scheduler(value):
        return Scheduler(_stored(name, _SCHEDULER), value)
    if is_stateful(value):
        return Stateful(name or type(value).__name__, value)
    return Value(name, value, holder, key) if is_plain(value) else None


def _stored(name: str, usual: str) -> str:
    return usual if name.lower() in _SPELLINGS[usual] else name


__all__ = [
    "Item",
    "PerRank",
    "Prepared",
    "ReshardableLoader",
    "ReshardableSampler",
    "Rng",
    "Value",
    "World",
    "by_rank",
    "combined",
    "item_of",
]
