"""Targets: modules, optimizers, schedulers and plain tensors, taken apart into what is to be filled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ucp.catalog import Kind
from ucp.errors import UsageError
from ucp.format.spreads import LiveMesh, Spread
from ucp.layout import Shape
from ucp.layout.region import numel
from ucp.train import frameworks
from ucp.train.declared import DeclaredLayout, declare
from ucp.train.held import Held, held
from ucp.train.items import Item, item_of
from ucp.train.meshes import largest, root_of, spread_of
from ucp.train.scheduler import STATE
from ucp.train.shards import plain_of
from ucp.train.state.live import is_plain
from ucp.train.state.stateful import Scheduler

_MODULE_ROLES = ("model", "module")
_OPTIMIZER_ROLES = ("optimizer", "optim")
_SCHEDULER_ROLES = ("lr_scheduler", "scheduler")
_ROLES = (*_MODULE_ROLES, *_OPTIMIZER_ROLES, *_SCHEDULER_ROLES)

_STATES = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq exp_inf mu_product mu momentum_buffer sum square_avg grad_avg acc_delta "
    "row_var col_var variance ax prev step_size eta".split()
)
"""States of the optimizers in torch/optim: a dict of them is of one tensor."""

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Buffers of torch/nn/modules/batchnorm.py, which differ by rank; a state dict does not tell them from parameters."""

Resize = Callable[[Shape], Held | None]
"""What a rank holds of a tensor that has another shape in a checkpoint; None where that cannot be the same tensor."""


@dataclass(slots=True)
class Slot:
    """One state of one tensor of a job; `names` are all its names, more than one where it is tied.

    `tensor` is the framework's own. `placed` says what it holds where it does not tell by itself: a part of it, a box
    that the framework knows of, or one of several tensors in flat memory; `spread` then tells of its mesh, outside of
    the tensor's own if that is a DTensor. `resize` is given where the framework lets
    checkpoints have other shapes of it, such as more or fewer rows of padding. An `echo` is filled, but never saved:
    another rank's is the tensor that counts.
    """

    names: list[str]
    state: str
    tensor: torch.Tensor
    kind: Kind
    placed: Held | None = None
    resize: Resize | None = None
    spread: tuple[Spread, ...] = ()
    echo: bool = False

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """How it lies on the meshes of the job, from the outermost in; nothing of what is plain."""
        if not isinstance(self.tensor, DTensor):
            return self.spread
        return (*self.spread, spread_of(self.tensor.device_mesh, self.tensor.placements))

    @property
    def label(self) -> str:
        """For people."""
        return self.names[0] if self.state == "value" else f"{self.names[0]}[{self.state}]"

    @property
    def shape(self) -> Shape:
        """That of the whole tensor."""
        return tuple(self.tensor.shape) if self.placed is None else self.placed.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of its memory."""
        return self.tensor.dtype if self.placed is None else self.placed.memory.dtype

    @property
    def empty(self) -> bool:
        """Whether flat memory has no element of it on this rank, though it has some."""
        return self.placed is not None and not self.placed.places and bool(numel(self.placed.shape))

    def held(self) -> Held:
        """What this rank holds of it; FitError for what has no plain memory."""
        return held(self.tensor, self.label) if self.placed is None else self.placed

    def refit(self, shape: Shape) -> None:
        """Hold what there is of it in a checkpoint where it has `shape`."""
        if self.resize is not None and shape != self.shape:
            self.placed = self.resize(shape) or self.placed


@dataclass(slots=True)
class NamedGroup:
    """A group of an optimizer that is there as a state dict: names of its parameters, and its hyper-parameters."""

    names: list[str]
    options: dict[str, Any]


@dataclass(slots=True)
class Targets:
    """A job's state taken apart. `transient` names the buffers that modules keep out of their state dict.

    Optimizers are torch's, and their parameters may be flat memory of many tensors; of those that are state dicts,
    states are slots like values, and `named_groups` are the rest. `after` is run once everything was
    filled: what the framework derives from it, such as low-precision weights. `checks` raise, before anything is
    saved, where what derives does not; `refusals` before anything is filled, where it would not last. `meshes` are
    further ones that the job lies on, beside those of its tensors.
    """

    slots: list[Slot] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    named_groups: list[NamedGroup] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    transient: list[str] = field(default_factory=list)
    after: list[Callable[[], None]] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)
    refusals: list[Callable[[], None]] = field(default_factory=list)
    meshes: list[LiveMesh] = field(default_factory=list)
    _by_memory: dict[Hashable, Slot] = field(default_factory=dict)
    _by_name: dict[tuple[str, str], Slot] = field(default_factory=dict)
    _named: dict[str, list[Slot]] = field(default_factory=dict)
    _by_parameter: dict[Hashable, list[Slot]] = field(default_factory=dict)

    def add(
        self,
        names: str | Sequence[str],
        state: str,
        tensor: torch.Tensor,
        *,
        placed: Held | None = None,
        kind: Kind | None = None,
        resize: Resize | None = None,
        spread: tuple[Spread, ...] = (),
        echo: bool = False,
    ) -> None:
        """Ask for `state` of a tensor in `tensor`, of which `placed` may say what it holds.

        It is called by all `names`; what has the same memory is tied, too. The values of an optimizer's parameter are
        given with that parameter as `tensor`. Several tensors may hold one in parts, as layers that are stored stacked.
        UsageError where two are to hold the same state of the same name, or one is to hold two states.
        """
        first, *others = [names] if isinstance(names, str) else names
        place: Hashable = memory(tensor)
        if placed is not None:
            # Flat memory may hold nothing of many tensors.
            place = (place, placed.shape, placed.places or first)
        for name in (first, *others):
            slot = self._add(name, state, tensor, place, placed, kind)
            slot.resize = resize or slot.resize
            slot.spread = spread or slot.spread
            slot.echo = echo or slot.echo

    def _add(
        self,
        name: str,
        state: str,
        tensor: torch.Tensor,
        place: Hashable,
        placed: Held | None,
        kind: Kind | None,
    ) -> Slot:
        slot = self._by_memory.get(place)
        if slot is None:
            self._by_memory[place] = slot = Slot([], state, tensor, kind or _kind(tensor), placed)
            self.slots.append(slot)
            self._by_parameter.setdefault(memory(tensor), []).append(slot)
        if slot.state != state:
            raise UsageError(f"one tensor is to hold both {slot.label} and {name}[{state}]")
        if not _apart(self._by_name.setdefault((name, state), slot), slot):
            raise UsageError(
                f"the target has two tensors named {name if state == 'value' else f'{name}[{state}]'}",
                hint="put modules with equal names into one nn.ModuleDict, which prefixes them, or take one at a time",
            )
        if name not in slot.names:
            slot.names.append(name)
            self._named.setdefault(name, []).append(slot)
        return slot

    def names(self) -> list[str]:
        """All names asked for, once each."""
        named = (name for group in self.named_groups for name in group.names)
        return list(dict.fromkeys([*(name for slot in self.slots for name in slot.names), *named]))

    def slots_named(self, name: str) -> Sequence[Slot]:
        """The states of a tensor that are in slots of their own."""
        return self._named.get(name, ())

    def add_item(self, item: Item | None) -> bool:
        """Take training state that is no tensor; whether there was any. UsageError for two of one name."""
        if item is None:
            return False
        if isinstance(item, Scheduler) and item.name == STATE:
            self.schedulers.append(item.object)
        elif self.items.setdefault(item.name, item) != item:
            raise UsageError(f"two things are called {item.name}", hint="name them in a dict")
        return True

    def axes(self) -> tuple[tuple[str, int], ...]:
        """Axes of the largest mesh that the job lies on; none if all is plain."""
        tensors = (slot.tensor for slot in self.slots if isinstance(slot.tensor, DTensor))
        roots = [root_of(tensor.device_mesh) for tensor in tensors]
        return largest([*roots, *self.meshes, *(spread.mesh for slot in self.slots for spread in slot.spread)])

    def slots_of(self, parameter: torch.Tensor) -> Sequence[Slot]:
        """What an optimizer's parameter holds: one tensor, or several in flat memory; none that nothing else names."""
        return self._by_parameter.get(memory(parameter), ())


def _apart(slot: Slot, other: Slot) -> bool:
    """Whether two slots of one name are the same, or different parts of a tensor."""
    if slot is other or slot.placed is None or other.placed is None:
        return slot is other
    return slot.placed.shape == other.placed.shape and not any(
        a.region.intersect(b.region) for a in slot.placed.places for b in other.placed.places
    )


def _kind(tensor: torch.Tensor) -> Kind:
    return "frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else "parameter"


def memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors whose elements are the same memory; tensors without memory are only equal to themselves."""
    local = _plain(tensor)
    if local is None:
        return id(tensor)
    placed = (tuple(tensor.shape), tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, placed)


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a rank has of a tensor, if it is memory that can be compared."""
    local = plain_of(tensor)
    plain = type(local) is torch.Tensor and local.layout == torch.strided and local.numel() and local.data_ptr()
    return local if plain else None


def take_apart(target: Any, *, layout: DeclaredLayout | None = None) -> Targets:
    """The tensors, optimizers and schedulers of a target; UsageError for anything else in it.

    A module gives parameters and persistent buffers; a dict gives ``name: tensor``, ``name: {state: tensor}`` and,
    under the keys ``model``, ``optimizer`` and ``lr_scheduler``, more of the same; a tuple or list gives its elements.
    Other dicts in it are put into it, names joined by dots, but for what modules and optimizers are in them.
    `layout` says of tensors by globs of their names how they lie on a mesh, where they do not tell themselves.
    """
    found = Targets()
    take_value(found, target)
    if layout:
        declare(found, layout)
    if not found.slots and not found.items:
        raise UsageError(f"nothing to load into: {type(target).__name__}", hint=_HINT)
    _check_overlap(found.slots)
    return found


_HINT = "give a module, (module, optimizer), or {'model': …, 'optimizer': …, 'lr_scheduler': …}"


def take_value(found: Targets, target: Any) -> None:
    """Add what a target, or a part of one, holds to `found`; UsageError for what cannot be taken."""
    if not frameworks.take(found, target):
        _take_torch(found, target)


def _take_torch(found: Targets, target: Any) -> None:
    if isinstance(target, nn.Module):
        take_module(found, target)
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
            take_value(found, part)
    elif is_plain(target) or not found.add_item(item_of("", target)):
        raise UsageError(f"cannot take a {type(target).__name__}", hint=_HINT)


def _take_mapping(found: Targets, target: Mapping[Any, Any], prefix: str = "") -> None:
    """Entries of a dict; `prefix` is put before names that are its own, and not a module's."""
    holder = target if isinstance(target, MutableMapping) else None
    for key, value in target.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            add_tensor(found, name, "value", value)
        elif key in _ROLES:
            take_value(found, value)
        elif frameworks.take(found, value) or found.add_item(item_of(name, value, holder=holder, key=key)):
            continue
        elif not isinstance(value, Mapping):
            _take_torch(found, value)
        elif _are_states(value):
            for state, tensor in value.items():
                if not isinstance(tensor, torch.Tensor):
                    raise UsageError(f"{name}[{state}]: cannot take a {type(tensor).__name__}", hint=_HINT)
                found.add(name, str(state), tensor)
        else:
            _take_mapping(found, value, f"{name}.")


def add_tensor(found: Targets, name: str, state: str, tensor: torch.Tensor) -> None:
    """Ask for a state of a tensor in one that a state dict gives."""
    if type(tensor).__name__ == "ShardedTensor":
        from ucp.train.frameworks.sharded_tensor import add_sharded

        add_sharded(found, name, state, tensor)
    else:
        known = name.rpartition(".")[2] in _STATISTICS
        found.add(name, state, tensor, kind="buffer" if known else None)


def _are_states(value: Mapping[Any, Any]) -> bool:
    """Whether a dict is of states of one tensor, and not of tensors of its own."""
    return "value" in value or value.keys() <= _STATES


def _check_overlap(slots: Sequence[Slot]) -> None:
    """UsageError where two tensors that are to be filled share a part of their memory: the last one would win."""
    whole = (slot for slot in slots if slot.placed is None)
    runs = sorted((run for slot in whole if (run := _run(slot))), key=lambda run: run[:3])
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


def take_module(found: Targets, module: nn.Module, *, known: Container[int] = ()) -> None:
    """Parameters and persistent buffers by fully qualified name, tied ones under each of their names.

    Parameters whose ids are `known` are in `found` already.
    """
    _show_shards(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            found.add(name, "value", parameter)
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{own}" if prefix else own
            if own in child._non_persistent_buffers_set:
                found.transient.append(name)
            else:
                found.add(name, "value", buffer, kind="buffer")


def _show_shards(module: nn.Module) -> None:
    """FSDP2 modules keep gathered copies of their parameters after a forward pass; those are thrown away."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
