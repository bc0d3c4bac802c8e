"""Saving a running job: every rank writes its own shards, each box once, and rank 0 the manifest, last.

Normative text of what is written: spec/shard-format.md.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from crc32c import crc32c
from torch import nn
from torch.distributed.tensor import DTensor

from ucp.catalog import Scalar, Source, Tensor
from ucp.errors import ConflictError, FitError
from ucp.format.documents import Json
from ucp.format.native_manifest import BLOCK_BYTES, ROOT, NativeManifest, Part, Shard, dumps
from ucp.format.native_shard import Piece, ShardFile, shard_files
from ucp.format.state import Encoder
from ucp.layout import Mesh
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Cover, Extent, Fragment, Key, TensorSpec
from ucp.store import Store, open_store
from ucp.train.fit import dtype_name
from ucp.train.names import stripped
from ucp.train.scheduler import STATE
from ucp.train.shards import local_tensor, parts
from ucp.train.targets import Targets, take_apart
from ucp.train.team import Team

Digests = tuple[int, ...]


@dataclass(slots=True)
class Inventory:
    """What one rank holds, without data: it travels to rank 0. `groups` are (parameter names, options)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[list[str], dict[str, Any]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    axes: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class Written:
    """What one rank wrote, and the digests of all it holds."""

    shards: list[Shard] = field(default_factory=list)
    parts: list[tuple[Key, Part]] = field(default_factory=list)
    digests: dict[Piece, Digests] = field(default_factory=dict)


def save(state: Any, url: str, *, step: int | None = None) -> None:
    """Save what this job's ranks hold together as one checkpoint at `url`. Collective: every rank calls it.

    `state` is what `ucp.load` fills: a module, ``(module, optimizer)``, a dict ``name: tensor``, or a dict of these under
    ``model``, ``optimizer`` and ``lr_scheduler``. DTensors (FSDP2, TP, 2-D meshes) are saved as the shards they are. A
    plain tensor counts as the same on all ranks that hold one of its name, as under DistributedDataParallel; of a buffer,
    the lowest rank's copy is taken. `step` is the number of optimizer steps done.

    On return the checkpoint is complete. If anything fails on any rank every rank raises, and there is none: FitError for
    what cannot be saved, ConflictError for replicas that differ and for a `url` that holds a checkpoint already,
    StorageError where writing fails or a rank is gone.
    """
    store, team = open_store(url), Team(url)
    held: dict[Piece, torch.Tensor] = {}
    lead = _Lead(store, team.world, step)
    mine = team.round(lambda: _take_inventory(state, held), lead.assign)
    team.round(lambda: _write(store, team.rank, set(mine), held), lead.commit)


def _take_inventory(state: Any, held: dict[Piece, torch.Tensor]) -> Inventory:
    """List what this rank has of `state`; `held` gets the memory of each piece."""
    targets, found = take_apart(state), Inventory()
    buffers = {id(buffer) for module in _modules(state) for buffer in module.buffers()}
    for slot in targets.slots:
        name, *aliases = dict.fromkeys(_names(targets, slot.names))
        kind = "parameter" if slot.tensor.requires_grad else "buffer" if id(slot.tensor) in buffers else "frozen"
        if not isinstance(slot.tensor, nn.Parameter) and kind == "frozen":
            kind = "parameter"
        found.tensors.setdefault(name, Tensor(name, kind, {}))
        found.ties.update(dict.fromkeys(aliases, name))
        _take(found, held, Key(name, slot.state), slot.tensor)
    for optimizer in targets.optimizers:
        for group in optimizer.param_groups:
            names = [_parameter_name(targets, parameter) for parameter in group["params"]]
            options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            found.groups.append((names, options))
            for name, parameter in zip(names, group["params"], strict=True):
                _take_states(found, held, name, parameter, optimizer.state.get(parameter, {}))
    if len(targets.schedulers) > 1:
        raise FitError("more than one learning-rate scheduler cannot be saved")
    found.state = {STATE: scheduler.state_dict() for scheduler in targets.schedulers}
    found.axes = _axes(slot.tensor for slot in targets.slots)
    return found
