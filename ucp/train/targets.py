"""Targets: modules, optimizers, schedulers and plain tensors, taken apart into what is to be filled."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ucp.errors import FitError, UsageError

_MODULE_ROLES = ("model", "module")
_OPTIMIZER_ROLES = ("optimizer", "optim")
_SCHEDULER_ROLES = ("lr_scheduler", "scheduler")
_ROLES = (*_MODULE_ROLES, *_OPTIMIZER_ROLES, *_SCHEDULER_ROLES)


@dataclass(slots=True)
class Slot:
    """One tensor to fill with one state; `names` are all its names, more than one where it is tied."""

    names: list[str]
    state: str
    tensor: torch.Tensor

    @property
    def label(self) -> str:
        """For people."""
        return self.names[0] if self.state == "value" else f"{self.names[0]}[{self.state}]"


@dataclass(slots=True)
class Targets:
    """A target taken apart. `transient` names the buffers that modules keep out of their state dict."""

    slots: list[Slot] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    transient: list[str] = field(default_factory=list)
    _by_memory: dict[Hashable, Slot] = field(default_factory=dict)
    _by_name: dict[tuple[str, str], Slot] = field(default_factory=dict)

    def add(self, name: str, state: str, tensor: torch.Tensor) -> None:
        """Ask for `state` of `name` in `tensor`; tensors of the same memory are tied.

        UsageError where two tensors are to hold the same state of the same name, or one is to hold two states.
        """
        slot = self._by_memory.get(memory(tensor))
        if slot is None:
            self._by_memory[memory(tensor)] = slot = Slot([], state, tensor)
            self.slots.append(slot)
        if slot.state != state:
            raise UsageError(f"one tensor is to hold both {slot.label} and {name}[{state}]")
        if self._by_name.setdefault((name, state), slot) is not slot:
            raise UsageError(
                f"the target has two tensors named {name if state == 'value' else f'{name}[{state}]'}",
                hint="put modules with equal names into one nn.ModuleDict, which prefixes them, or take one at a time",
            )
        if name not in slot.names:
            slot.names.append(name)

    def names(self) -> list[str]:
        """All names asked for, once each."""
        return list(dict.fromkeys(name for slot in self.slots for name in slot.names))

    def names_of(self, parameter: torch.Tensor) -> list[str]:
        """Names of a parameter of an optimizer; none if no module or dict of the target holds it."""
        slot = self._by_memory.get(memory(parameter))
        return slot.names if slot else []


def memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors whose elements are the same memory; tensors without memory are only equal to themselves."""
    local = _plain(tensor)
    if local is None:
        return id(tensor)
    placed = (tuple(tensor.shape), tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, placed)


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a rank has of a tensor, if it is memory that can be compared."""
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    plain = type(local) is torch.Tensor and local.layout == torch.strided and local.numel() and local.data_ptr()
    return local if plain else None


def take_apart(target: Any) -> Targets:
    """The tensors, optimizers and schedulers of a target; UsageError for anything else in it.

    A module gives parameters and persistent buffers; a dict gives ``name: tensor``, ``name: {state: tensor}`` and,
    under the keys ``model``, ``optimizer`` and ``lr_scheduler``, more of the same; a tuple or list gives its elements.
    """
    found = Targets()
    _take(found, target)
    if not found.slots:
        raise UsageError(f"nothing to load into: {type(target).__name__}", hint=_HINT)
    _check_overlap(found.slots)
    return found


_HINT = "give a module, (module, optimizer), or {'model': …, 'optimizer': …, 'lr_scheduler': …}"


def _take(found: Targets, target: Any) -> None:
    if isinstance(target, nn.Module):
        _take_module(found, target)
    elif isinstance(target, Optimizer):
        inner = getattr(target, "optimizer", None)
        if type(target).__name__ == "ZeroRedundancyOptimizer":
            raise UsageError(
                "cannot load into a ZeroRedundancyOptimizer: it keeps the states of a part of the parameters only",
                hint="use fully_shard with a plain optimizer",
            )
        found.optimizers.append(inner if isinstance(inner, Optimizer) else target)
    elif isinstance(target, Mapping):
        _take_mapping(found, target)
    elif isinstance(target, tuple | list):
        for part in target:
            _take(found, part)
    elif callable(getattr(target, "load_state_dict", None)) and callable(getattr(target, "get_last_lr", None)):
        found.schedulers.append(target)
    elif callable(getattr(target, "load_state_dict", None)):
        raise UsageError(
            f"cannot load into a {type(target).__name__}",
            hint="hand it its own part of the training state: load_state_dict(ckpt.read_state(...))",
        )
    else:
        raise UsageError(f"cannot load into a {type(target).__name__}", hint=_HINT)


def _take_mapping(found: Targets, target: Mapping[Any, Any]) -> None:
    if target.keys() == {"state", "param_groups"}:
        raise UsageError("cannot load into an optimizer's state_dict()", hint="give the optimizer itself")
    for key, value in target.items():
        if isinstance(value, torch.Tensor):
            found.add(str(key), "value", value)
        elif key in _ROLES or not isinstance(value, Mapping):
            _take(found, value)
        else:
            for state, tensor in value.items():
                if not isinstance(tensor, torch.Tensor):
                    raise UsageError(f"{key}[{state}]: cannot load into a {type(tensor).__name__}", hint=_HINT)
                found.add(str(key), str(state), tensor)


def _check_overlap(slots: Sequence[Slot]) -> None:
    """UsageError where two tensors that are to be filled share a part of their memory: the last one would win."""
    runs = sorted((run for slot in slots if (run := _run(slot))), key=lambda run: run[:3])
    for (device, _, stop, one), (other_device, start, _, other) in itertools.pairwise(runs):
        if device == other_device and start < stop:
            raise UsageError(
                f"{one.label} and {other.label} share a part of their memory", hint="load one of them at a time"
            )


def _run(slot: Slot) -> tuple[str, int, int, Slot] | None:
    """Device, first byte and one past the last of a tensor's memory, if that is one run without gaps."""
    local = _plain(slot.tensor)
    if local is None:
        return None
    span = 1 + sum((n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True))
    if span != local.numel():
        return None
    start = local.data_ptr()
    return str(local.device), start, start + span * local.element_size(), slot


def _take_module(found: Targets, module: nn.Module) -> None:
    """Parameters and persistent buffers by fully qualified name, tied ones under each of their names."""
    _show_shards(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.add(name, "value", parameter)
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{own}" if prefix else own
            if own in child._non_persistent_buffers_set:
                found.transient.append(name)
            else:
                found.add(name, "value", buffer)


def _show_shards(module: nn.Module) -> None:
    """FSDP2 modules keep gathered copies of their parameters after a forward pass; those are thrown away."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for name, child in module.named_modules():
        if isinstance(child, FSDPModule):
            child.reshard()
        elif isinstance(child, FullyShardedDataParallel):
            raise FitError(
                f"{name or 'the module'}: FSDP1 keeps flat parameters that cannot be filled by name",
                hint="load before wrapping, or use torch.distributed.fsdp.fully_shard",
            )
