"""Targets: modules, optimizers, schedulers and plain tensors, taken apart into what is to be filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
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
    """A target taken apart. `modules` are those it held."""

    slots: list[Slot] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    _by_tensor: dict[int, Slot] = field(default_factory=dict)

    def add(self, name: str, state: str, tensor: torch.Tensor) -> None:
        """Ask for `state` of `name` in `tensor`; a tensor that was added before is tied."""
        slot = self._by_tensor.get(id(tensor))
        if slot is None:
            self._by_tensor[id(tensor)] = slot = Slot([], state, tensor)
            self.slots.append(slot)
        if slot.state != state:
            raise UsageError(f"one tensor is to hold both {slot.label} and {name}[{state}]")
        slot.names.append(name)

    def names(self) -> list[str]:
        """All names asked for, once each."""
        return list(dict.fromkeys(name for slot in self.slots for name in slot.names))

    def names_of(self, parameter: torch.Tensor) -> list[str]:
        """Names of a parameter of an optimizer; none if no module or dict of the target holds it."""
        slot = self._by_tensor.get(id(parameter))
        return slot.names if slot else []


def take_apart(target: Any) -> Targets:
    """The tensors, optimizers and schedulers of a target; UsageError for anything else in it.

    A module gives parameters and persistent buffers; a dict gives ``name: tensor``, ``name: {state: tensor}`` and,
    under the keys ``model``, ``optimizer`` and ``lr_scheduler``, more of the same; a tuple or list gives its elements.
    """
    found = Targets()
    _take(found, target)
    if not found.slots:
        raise UsageError(f"nothing to load into: {type(target).__name__}", hint=_HINT)
    return found


_HINT = "give a module, (module, optimizer), or {'model': …, 'optimizer': …, 'lr_scheduler': …}"


def _take(found: Targets, target: Any) -> None:
    if isinstance(target, nn.Module):
        for name, tensor in _module_tensors(target):
            found.add(name, "value", tensor)
    elif isinstance(target, Optimizer):
        inner = getattr(target, "optimizer", None)
        found.optimizers.append(inner if isinstance(inner, Optimizer) else target)
    elif isinstance(target, Mapping):
        _take_mapping(found, target)
    elif isinstance(target, tuple | list):
        for part in target:
            _take(found, part)
    elif callable(getattr(target, "load_state_dict", None)) and callable(getattr(target, "get_last_lr", None)):
        found.schedulers.append(target)
    else:
        raise UsageError(f"cannot load into a {type(target).__name__}", hint=_HINT)


def _take_mapping(found: Targets, target: Mapping[Any, Any]) -> None:
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


def _module_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by fully qualified name, tied ones under each of their names."""
    _show_shards(module)
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


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
