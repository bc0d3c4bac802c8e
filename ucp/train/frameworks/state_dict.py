"""State dicts, filled in place and saved as they are: of optimizers by name, and of objects that hold a job's tensors.

The form is that of ``get_state_dict`` in torch/distributed/checkpoint/state_dict.py, nested or flattened: states and
groups of an optimizer by fully qualified name. ``Optimizer.state_dict()`` counts its parameters instead; their names
are in ``param_names`` if the optimizer was made with them (torch/optim/optimizer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ucp.errors import FitError, UsageError
from ucp.train.state.item import Item
from ucp.train.targets import NamedGroup, Targets, add_tensor, take_value

_NESTED = frozenset({"state", "param_groups"})
_STATE, _GROUP = "state.", "param_groups."
_ROLES = frozenset({"model", "module", "optimizer", "optim"})
_OWN = frozenset({"params", "param_names"})


def take(found: Targets, value: Any) -> bool:
    """Add an optimizer's state dict, or an object whose state dict holds tensors of a model or of an optimizer."""
    if not isinstance(value, Mapping):
        return _take_object(found, value)
    if value.keys() == _NESTED:
        _take_nested(found, value)
        return True
    if value and all(isinstance(key, str) and key.startswith((_STATE, _GROUP)) for key in value):
        _take_flattened(found, value)
        return True
    return False


def holds_tensors(value: Any) -> bool:
    """Whether `value` is a state dict of a model, or one with those of a model or of an optimizer in it."""
    if not isinstance(value, Mapping) or not value:
        return False
    if value.keys() == _NESTED or any(key in _ROLES and isinstance(one, Mapping) for key, one in value.items()):
        return True
    tensors = [one for one in value.values() if isinstance(one, torch.Tensor)]
    return len(tensors) == len(value) or any(isinstance(one, DTensor) for one in tensors)


def _take_object(found: Targets, value: Any) -> bool:
    """An object made as torch's ``Stateful`` (torch/distributed/checkpoint/stateful.py), if it holds tensors."""
    stateful = any(base.__name__ == "Stateful" and base.__module__.startswith("torch.") for base in type(value).__mro__)
    if not stateful or isinstance(value, nn.Module | Optimizer | Item):
        return False
    state = value.state_dict()
    if not holds_tensors(state):
        return False
    take_value(found, state)
    found.after.append(lambda: value.load_state_dict(state))
    return True


def _take_nested(found: Targets, value: Mapping[str, Any]) -> None:
    names = _names(value)
    for number, states in value["state"].items():
        _take_states(found, names.get(number, number), states)
    for group in value["param_groups"]:
        found.named_groups.append(NamedGroup([names.get(number, number) for number in group["params"]], group))


def _names(value: Mapping[str, Any]) -> dict[Any, str]:
    """Name of each key of an optimizer's states; UsageError for numbers without names."""
    found: dict[Any, str] = {}
    for group in value["param_groups"]:
        found |= dict(zip(group["params"], group.get("param_names", group["params"]), strict=True))
    if any(not isinstance(name, str) for name in (*found.values(), *(value["state"].keys() - found.keys()))):
        raise UsageError(
            "an optimizer's state_dict() counts its parameters, and does not name them",
            hint="give the optimizer itself, or what torch.distributed.checkpoint.state_dict.get_state_dict returns",
        )
    return found


def _take_states(found: Targets, name: str, states: Any) -> None:
    for state, value in states.items():
        _take_state(found, name, state, value, states, state)


def _take_state(found: Targets, name: str, state: str, value: Any, holder: Any, key: str) -> None:
    """One state of one parameter, kept as ``holder[key]``."""
    if isinstance(value, torch.Tensor) and not value.ndim and found.slots_of(value):
        # FSDP1 gives the step of a flat parameter to each of its tensors: these are not tied.
        room = value.detach().clone()
        found.add(name, state, room)
        found.after.append(_putting(holder, key, lambda: room))
    elif isinstance(value, torch.Tensor):
        add_tensor(found, name, state, value)
    elif isinstance(value, bool | int | float):
        # A number is read into a tensor of its own first.
        dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
        room = torch.tensor(value, dtype=dtype)
        found.add(name, state, room)
        found.after.append(_putting(holder, key, lambda: type(value)(room.item())))
    elif value is not None:
        raise FitError(f"{name}[{state}]: a {type(value).__name__} in an optimizer's state is no tensor and no number")


def _putting(holder: Any, key: str, value: Callable[[], Any]) -> Callable[[], None]:
    def put() -> None:
        if isinstance(holder, MutableMapping):
            holder[key] = value()

    return put


def _take_flattened(found: Targets, value: Mapping[str, Any]) -> None:
    """Keys are ``state.<name>.<state>`` and ``param_groups.<name>.<option>``; each name has its group's options."""
    options: dict[str, dict[str, Any]] = {}
    for key, one in value.items():
        if key.startswith(_STATE):
            name, _, state = key.removeprefix(_STATE).rpartition(".")
            _take_state(found, name, state, one, value, key)
        else:
            name, _, option = key.removeprefix(_GROUP).rpartition(".")
            options.setdefault(name, {})[option] = one
    for names, kept in _alike(options):
        group = NamedGroup(names, kept)
        found.named_groups.append(group)
        for name in names:
            for option in kept:
                found.after.append(_putting(value, f"{_GROUP}{name}.{option}", _reading(group, option)))


def _reading(group: NamedGroup, option: str) -> Callable[[], Any]:
    return lambda: group.options[option]


def _alike(options: Mapping[str, dict[str, Any]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Names with the same options, in the order in which they come."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for name, kept in options.items():
        known = next((names for names, others in groups if others == kept), None)
        if known is None:
            groups.append(([name], kept))
        else:
            known.append(name)
    yield from groups
