"""What one rank of a running job holds: boxes of tensors and optimizer states by name, and where their memory is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ucp.catalog import Scalar, Tensor
from ucp.errors import FitError
from ucp.format.native_shard import Piece
from ucp.format.spreads import Spread
from ucp.layout.dtypes import ITEMSIZE
from ucp.layout.region import numel
from ucp.plan import Key, TensorSpec
from ucp.train.declared import DeclaredLayout
from ucp.train.held import Held, held
from ucp.train.named import kept_options
from ucp.train.names import stripped
from ucp.train.scheduler import STATE
from ucp.train.shards import dtype_name, local_tensor
from ucp.train.state.live import tree_of
from ucp.train.targets import Slot, Targets, take_apart

Memory = dict[Piece, torch.Tensor]
"""The view of this rank's memory that holds each piece."""


@dataclass(slots=True)
class Inventory:
    """What a rank holds, without its data. `groups` are (parameter names, hyper-parameters), `axes` its mesh.

    `spreads` says of the tensors that are on a mesh how they lie on it. `state` is the training state that all ranks
    share, `ranked` what each rank has of its own.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[list[str], dict[str, Any]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    ranked: dict[str, Any] = field(default_factory=dict)
    axes: tuple[tuple[str, int], ...] = ()
    spreads: dict[str, tuple[Spread, ...]] = field(default_factory=dict)


def take_inventory(state: Any, memory: Memory, *, layout: DeclaredLayout | None = None) -> Inventory:
    """List what this rank has of `state`, and note in `memory` where; FitError for what cannot be saved.

    `layout` says how tensors lie on a mesh that do not tell themselves.
    """
    targets, found = take_apart(state, layout=layout), Inventory()
    for check in targets.checks:
        check()
    names = _Names(targets)
    for slot in (slot for slot in targets.slots if not slot.echo):
        name, *aliases = names.of(slot)
        if slot.state == "value":
            found.ties.update(dict.fromkeys(aliases, name))
            aliases = []
        for one in (name, *aliases):
            _add_slot(found, memory, one, slot, number=_counts(slot, targets))
    for optimizer in targets.optimizers:
        for group in optimizer.param_groups:
            held = [(parameter, slot) for parameter in group["params"] for slot in names.slots_of(parameter)]
            members = [(parameter, slot) for parameter, slot in held if not slot.echo]
            options = {key: _plain(value) for key, value in kept_options(group).items()}
            found.groups.append(([names.short[slot.names[0]] for _, slot in members], options))
            for parameter, slot in members:
                states = optimizer.state.get(parameter, {}) if _concerns(slot.held()) else {}
                _add_states(found, memory, names.short[slot.names[0]], slot, parameter, states)
    for named in targets.named_groups:
        options = {key: _plain(value) for key, value in kept_options(named.options).items()}
        found.groups.append((list(dict.fromkeys(names.short[name] for name in named.names)), options))
    schedules = [tree_of(scheduler.state_dict(), STATE) for scheduler in targets.schedulers]
    if schedules:
        found.state[STATE] = schedules[0]
    if any(other != schedules[0] for other in schedules):
        raise FitError("learning-rate schedulers that differ cannot be saved as one", hint="name them in a dict")
    for item in targets.items.values():
        (found.ranked if item.per_rank else found.state)[item.name] = item.saved()
    found.axes = targets.axes()
    return found


class _Names:
    """Names of tensors without wrappers' components, unless two would become one."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        names = targets.names()
        unique = len({stripped(name) for name in names}) == len(names)
        self.short = {name: stripped(name) if unique else name for name in names}

        values = (slot for slot in targets.slots if slot.state == "value")
        self.first = {self.short[name]: self.short[slot.names[0]] for slot in values for name in slot.names}

    def of(self, slot: Slot) -> list[str]:
        """Names of a slot; of a state in memory of its own, those of the tensors that it is the state of."""
        short = [self.short[name] for name in slot.names]
        return list(dict.fromkeys(short if slot.state == "value" else (self.first.get(name, name) for name in short)))

    def slots_of(self, parameter: torch.Tensor) -> Sequence[Slot]:
        """What an optimizer's parameter holds."""
        slots = self.targets.slots_of(parameter)
        if not slots:
            raise FitError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that no module given holds",
                hint="save (module, optimizer) with the module whose parameters it trains",
            )
        return slots


def _counts(slot: Slot, targets: Targets) -> bool:
    """Whether a state that is given as a tensor without dims is a number, as in an optimizer's state."""
    if slot.state == "value" or slot.tensor.ndim:
        return False
    values = [other for other in targets.slots_named(slot.names[0]) if other.state == "value"]
    return slot.state == "step" or any(other.shape for other in values)


def _concerns(held: Held) -> bool:
    """Whether this rank says what states a tensor has: where it holds none of its elements, others know better."""
    return bool(held.places) or not numel(held.shape)


def _add_slot(found: Inventory, memory: Memory, name: str, slot: Slot, *, number: bool) -> None:
    """List a slot under its shortest name, as a `number` or as boxes."""
    held = slot.held()
    if not _concerns(held):
        return
    found.tensors.setdefault(name, Tensor(name, slot.kind, {}))
    if slot.state == "value" and slot.spreads:
        found.spreads[name] = slot.spreads
    if number:
        scalars = {**found.tensors[name].scalars, slot.state: _scalar(slot.tensor, slot.label)}
        found.tensors[name] = replace(found.tensors[name], scalars=scalars)
    else:
        _add(found, memory, Key(name, slot.state), held)


def _add(found: Inventory, memory: Memory, key: Key, held: Held) -> None:
    """List this rank's boxes of one state of one tensor."""
    dtype = dtype_name(held.memory.dtype)
    if dtype not in ITEMSIZE:
        raise FitError(f"{key}: {dtype} cannot be stored", hint=f"what can: {' '.join(ITEMSIZE)}")
    tensor = found.tensors[key.name]
    found.tensors[key.name] = replace(tensor, states={**tensor.states, key.state: TensorSpec(held.shape, dtype)})
    for region, view in held.views():
        piece = Piece(key, dtype, region)
        memory[piece] = view
        found.pieces.append(piece)


def _add_states(
    found: Inventory, memory: Memory, name: str, slot: Slot, parameter: torch.Tensor, states: Mapping[str, Any]
) -> None:
    """List an optimizer's states of one parameter: tensors as states, numbers as scalars."""
    for state, value in states.items():
        if value is None:
            continue
        if _is_number(value, state, parameter):
            held = found.tensors[name]
            found.tensors[name] = replace(held, scalars={**held.scalars, state: _scalar(value, f"{name}[{state}]")})
        elif not isinstance(value, torch.Tensor):
            raise FitError(f"{name}[{state}]: a {type(value).__name__} in an optimizer's state cannot be saved")
        else:
            _add(found, memory, Key(name, state), _state_held(value, slot, parameter, f"{name}[{state}]"))


def _state_held(value: torch.Tensor, slot: Slot, parameter: torch.Tensor, label: str) -> Held:
    """What this rank holds of a state: laid out as its parameter where that is placed, else as it says itself."""
    same = getattr(value, "placements", None) == getattr(parameter, "placements", None)
    if slot.placed is not None and same and (local := local_tensor(value, label)).shape == slot.placed.memory.shape:
        return slot.placed.of(local)
    if slot.placed is not None or (isinstance(parameter, DTensor) and not isinstance(value, DTensor)):
        raise FitError(f"{label}: a plain tensor beside a sharded parameter: its layout is not known")
    return held(value, label)


def _is_number(value: Any, state: str, parameter: torch.Tensor) -> bool:
    """A tensor without dims is a number, except beside a parameter without dims, whose own states have none."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and (parameter.ndim > 0 or state == "step")
    return isinstance(value, bool | int | float)


def _scalar(value: Any, label: str) -> Scalar:
    if isinstance(value, torch.Tensor):
        return Scalar(local_tensor(value, label).item(), dtype_name(value.dtype))
    return Scalar(value, type(value).__name__)


def _plain(value: Any) -> Any:
    return local_tensor(value, "a hyper-parameter").tolist() if isinstance(value, torch.Tensor) else value
