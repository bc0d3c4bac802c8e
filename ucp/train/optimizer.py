"""Optimizers: their state per parameter, made and filled under the parameter's name."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ucp.catalog import Catalog, Scalar
from ucp.errors import FitError
from ucp.plan import TensorSpec
from ucp.train.fit import check_dtype, check_number
from ucp.train.held import Held, held
from ucp.train.report import Findings
from ucp.train.shards import local_tensor
from ucp.train.shares import Supply
from ucp.train.targets import Slot
from ucp.train.transfer import Fill

State = dict[str, Any]

_PLAIN_STEP = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
"""Ways to compute that not every device has, and that do not change which states an optimizer keeps."""


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of the job, `slot`, in an optimizer's parameter: called `name` there, filled from tensor `source`.

    `twins` are further tensors of the source, tied in the target, whose states must be the same.
    """

    slot: Slot
    name: str
    source: str
    twins: tuple[str, ...] = ()

    def label(self, state: str) -> str:
        """For people."""
        return f"{self.name}[{state}]"


@dataclass(slots=True)
class ParameterPlan:
    """The state that a parameter will have: `template` as the optimizer keeps it, filled for each of its `members`."""

    parameter: torch.Tensor
    members: Sequence[Member]
    template: State = field(default_factory=dict)
    result: State = field(default_factory=dict)


def plan_states(plan: ParameterPlan, catalog: Catalog, findings: Findings) -> bool:
    """Check that the source holds what the optimizer keeps for this parameter, and nothing else.

    False where states are missing or do not fit; then the parameter's state is best left alone.
    """
    good = not [member for member in plan.members if not _plan_member(plan, member, catalog, findings)]
    for state in plan.template:
        numbers = {repr(number) for member in plan.members if (number := _number_of(catalog, member, state))}
        if len(numbers) > 1:
            told = f"in one flat parameter of the target, whose {state} would be {' and '.join(sorted(numbers))}"
            findings.add("hyper-parameters", " ".join(member.name for member in plan.members[:3]), told)
            good = False
    return good


def _number_of(catalog: Catalog, member: Member, state: str) -> Scalar | None:
    return catalog.tensors[member.source].scalars.get(state)


def _plan_member(plan: ParameterPlan, member: Member, catalog: Catalog, findings: Findings) -> bool:
    tensor = catalog.tensors[member.source]
    stored = set(tensor.states) - {"value"}
    good = True
    for state, kept in plan.template.items():
        if state in tensor.states:
            good &= _fits(plan, member, state, tensor.states[state], findings)
        elif state in tensor.scalars:
            good &= _scalar_fits(member.label(state), kept, tensor.scalars[state], findings)
        elif kept is not None:
            findings.missing(member.label(state), state, [*stored, *tensor.scalars])
            good = False
    for state in sorted(stored - plan.template.keys()):
        findings.add("unexpected", member.label(state), "the target's optimizer keeps no such state")
    for twin in (catalog.tensors[name] for name in member.twins):
        if (twin.states, twin.scalars) != (tensor.states, tensor.scalars):
            findings.add(
                "ties", member.name, f"tied in the target, but the states of {member.source} and {twin.name} differ"
            )
            good = False
    return good


def _fits(plan: ParameterPlan, member: Member, state: str, spec: TensorSpec, findings: Findings) -> bool:
    kept, label = plan.template[state], member.label(state)
    if kept is not None and not isinstance(kept, torch.Tensor):
        findings.add("shape", label, f"a tensor in the source, a {type(kept).__name__} in the target")
        return False
    dtype = plan.parameter.dtype if kept is None else kept.dtype
    if spec.shape == member.slot.shape:
        return check_dtype(findings, member.name, state, spec.dtype, dtype)
    if (isinstance(plan.parameter, DTensor) or member.slot.placed is not None) and spec.shape:
        findings.add("shape", label, f"no layout is known for {list(spec.shape)} beside a sharded parameter")
        return False
    if kept is not None and kept.ndim != len(spec.shape):
        findings.add("shape", label, f"{list(spec.shape)} in the source, {kept.ndim} dims in the target")
        return False
    return check_dtype(findings, member.name, state, spec.dtype, dtype)


def _scalar_fits(label: str, kept: Any, scalar: Scalar, findings: Findings) -> bool:
    if isinstance(kept, torch.Tensor) and kept.numel() == 1:
        return check_number(findings, label, scalar.value, kept.dtype)
    if isinstance(kept, bool | int | float):
        return check_number(findings, label, scalar.value, _dtype(kept))
    if kept is None:
        return True
    findings.add("shape", label, f"a number in the source, a {type(kept).__name__} in the target")
    return False


def _dtype(number: float) -> torch.dtype:
    """What holds any number of the same Python type."""
    if isinstance(number, bool):
        return torch.bool
    return torch.int64 if isinstance(number, int) else torch.float64


def allocate(plan: ParameterPlan, catalog: Catalog, supply: Supply) -> list[Fill]:
    """Make the new state in `plan.result`, reusing tensors that fit, and say how to fill it."""
    fills: list[Fill] = []
    first = catalog.tensors[plan.members[0].source]
    for state, kept in plan.template.items():
        if state in first.states:
            plan.result[state] = made = _room(plan, kept, first.states[state])
            for member in plan.members:
                fills += supply.fills(_held(member, made, state), member.source, state, member.twins)
        elif state in first.scalars:
            plan.result[state] = _number(kept, first.scalars[state])
        else:
            plan.result[state] = kept
    return fills


def _held(member: Member, state: torch.Tensor, name: str) -> Held:
    label, placed = member.label(name), member.slot.placed
    return held(state, label) if placed is None else placed.of(local_tensor(state, label))


def _room(plan: ParameterPlan, kept: Any, spec: TensorSpec) -> torch.Tensor:
    """A tensor for a state: the one that is there, else one laid out as the parameter is, its padding zero."""
    parameter, slot = plan.parameter, plan.members[0].slot
    dtype = parameter.dtype if kept is None else kept.dtype
    like = spec.shape == slot.shape
    wanted = spec.shape if slot.placed is None else tuple(parameter.shape)
    if isinstance(kept, torch.Tensor) and tuple(kept.shape) == wanted:
        same = not like or isinstance(kept, DTensor) == isinstance(parameter, DTensor)
        if same and kept.device == parameter.device and kept._base is None:
            return kept
    if slot.placed is not None:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    if like:
        return torch.empty_like(parameter.detach(), dtype=dtype, memory_format=torch.preserve_format)
    return torch.empty(spec.shape, dtype=dtype, device=parameter.device)


def _number(kept: Any, scalar: Scalar) -> Any:
    if isinstance(kept, torch.Tensor):
        return torch.full_like(kept, scalar.value)
    return scalar.value if kept is None else type(kept)(scalar.value)


def template(optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor, known: dict[Any, State]) -> State:
    """The state that `optimizer` keeps for `parameter`: what it has, or what it would make in its first step.

    To find out, the optimizer's own ``step`` runs once on a zero tensor of the parameter's dtype, device and number of
    dims; nothing of the optimizer is changed. `group` holds the hyper-parameters after the load; `known` remembers.
    FitError for an optimizer that cannot step on zeros: what it would keep is not guessed.
    """
    state = optimizer.state.get(parameter)
    if state:
        return dict(state)
    shape = tuple(max(1, min(2, n)) for n in parameter.shape)
    key = (id(optimizer), id(group["params"]), shape, parameter.dtype, parameter.device)
    if key not in known:
        known[key] = _tried(optimizer, group, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    # Copies: a state that happens to have the parameter's own shape is filled in place, and belongs to it alone.
    return {name: kept.clone() if isinstance(kept, torch.Tensor) else kept for name, kept in known[key].items()}


def _tried(optimizer: Optimizer, group: Mapping[str, Any], zeros: torch.Tensor) -> State:
    """The first state from a step as it is configured, else from a plain one, else from one on a sparse gradient."""
    plain = {**group, **{key: value for key, value in _PLAIN_STEP.items() if key in group}}
    errors = []
    for options, gradient in ((group, zeros), (plain, zeros), (plain, zeros.to_sparse())):
        try:
            return _first_state(optimizer, options, zeros, gradient)
        except Exception as error:  # noqa: BLE001  an optimizer that we do not know may raise anything
            errors.append(error)
    raise FitError(f"{type(optimizer).__name__} makes no state from zero gradients ({errors[0]})") from errors[0]


def _first_state(optimizer: Optimizer, group: Mapping[str, Any], zeros: torch.Tensor, gradient: torch.Tensor) -> State:
    dummy = torch.nn.Parameter(zeros.clone())
    dummy.grad = gradient.clone()
    twin: Any = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():
        twin.__dict__[key] = copy(value) if type(value) in (list, dict, set) else value
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [dummy]}]
    twin.defaults = {key: group.get(key, value) for key, value in optimizer.defaults.items()}
    # The instance's own `step` may be a learning-rate scheduler's, which counts calls.
    type(optimizer).step(twin)
    return dict(twin.state[dummy])
