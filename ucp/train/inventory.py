"""What one rank of a running job holds: boxes of tensors and optimizer states by name, and where their memory is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ucp.catalog import Kind, Scalar, Tensor
from ucp.errors import FitError
from ucp.format.native_shard import Piece
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Key, TensorSpec
from ucp.train.fit import dtype_name
from ucp.train.names import stripped
from ucp.train.scheduler import STATE
from ucp.train.shards import local_tensor, parts
from ucp.train.targets import Targets, take_apart

Memory = dict[Piece, torch.Tensor]
"""The view of this rank's memory that holds each piece."""


@dataclass(slots=True)
class Inventory:
    """What a rank holds, without its data. `groups` are (parameter names, hyper-parameters), `axes` its mesh."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[list[str], dict[str, Any]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    axes: tuple[tuple[str, int], ...] = ()


def take_inventory(state: Any, memory: Memory) -> Inventory:
    """List what this rank has of `state`, and note in `memory` where; FitError for what cannot be saved."""
    targets, found = take_apart(state), Inventory()
    names = _Names(targets)
    buffers = {id(buffer) for module in _modules(state) for buffer in module.buffers()}
    for slot in targets.slots:
        name, *aliases = dict.fromkeys(names.short[full] for full in slot.names)
        found.tensors.setdefault(name, Tensor(name, _kind(slot.tensor, buffers), {}))
        found.ties.update(dict.fromkeys(aliases, name))
        _add(found, memory, Key(name, slot.state), slot.tensor)
    for optimizer in targets.optimizers:
        for group in optimizer.param_groups:
            members = [(names.of(parameter), parameter) for parameter in group["params"]]
            options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            found.groups.append(([name for name, _ in members], options))
            for name, parameter in members:
                _add_states(found, memory, name, parameter, optimizer.state.get(parameter, {}))
    if len(targets.schedulers) > 1:
        raise FitError("only one learning-rate scheduler can be saved")
    if targets.schedulers:
        found.state[STATE] = targets.schedulers[0].state_dict()
    found.axes = _axes(slot.tensor for slot in targets.slots)
    return found


class _Names:
    """Names of tensors without wrappers' components, unless two would become one."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        names = targets.names()
        unique = len({stripped(name) for name in names}) == len(names)
        self.short = {name: stripped(name) if unique else name for name in names}

    def of(self, parameter: torch.Tensor) -> str:
        """Name of an optimizer's parameter."""
        names = self.targets.names_of(parameter)
        if not names:
            raise FitError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that no module given holds",
                hint="save (module, optimizer) with the module whose parameters it trains",
            )
        return self.short[names[0]]


def _modules(state: Any) -> Iterator[nn.Module]:
    if isinstance(state, nn.Module):
        yield state
    elif isinstance(state, Mapping | tuple | list):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from _modules(part)


def _kind(tensor: torch.Tensor, buffers: set[int]) -> Kind:
    if id(tensor) in buffers:
        return "buffer"
    return "frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else "parameter"


def _add(found: Inventory, memory: Memory, key: Key, tensor: torch.Tensor) -> None:
    """List this rank's boxes of one state of one tensor."""
    dtype = dtype_name(tensor.dtype)
    if dtype not in ITEMSIZE:
        raise FitError(f"{key}: {dtype} cannot be stored", hint=f"what can: {' '.join(ITEMSIZE)}")
    held = found.tensors[key.name]
    spec = TensorSpec(tuple(tensor.shape), dtype)
    found.tensors[key.name] = replace(held, states={**held.states, key.state: spec})
    local = local_tensor(tensor, str(key))
    for part in parts(tensor, str(key)):
        piece = Piece(key, dtype, part.region)
        here = tuple(slice(a, b) for a, b in zip(part.local.start, part.local.stop, strict=True))
        memory[piece] = local[here]
        found.pieces.append(piece)


def _add_states(
    found: Inventory, memory: Memory, name: str, parameter: torch.Tensor, states: Mapping[str, Any]
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
        elif isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            raise FitError(f"{name}[{state}]: a plain tensor beside a sharded parameter: its layout is not known")
        else:
            _add(found, memory, Key(name, state), value)


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


def _axes(tensors: Iterator[torch.Tensor]) -> tuple[tuple[str, int], ...]:
    """Axes of the largest mesh that a tensor lies on; none if all tensors are plain."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    if not meshes:
        return ()
    mesh = max(meshes, key=lambda mesh: mesh.size())
    names = mesh.mesh_dim_names or tuple(f"axis{number}" for number in range(mesh.ndim))
    return tuple(zip(names, mesh.shape, strict=True))
