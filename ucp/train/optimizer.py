"""Optimizers: their state per parameter, made and filled under the parameter's name."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
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
from ucp.train.report import Findings
from ucp.train.shares import Supply
from ucp.train.transfer import Fill

State = dict[str, Any]

_PLAIN_STEP = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
"""Ways to compute that not every device has, and that do not change which states an optimizer keeps."""


@dataclass(slots=True)
class ParameterPlan:
    """The state that a parameter will have: `template` as the optimizer keeps it, filled from tensor `source`.

    `twins` are further tensors of the source, tied in the target, whose states must be the same.
    """

    parameter: torch.Tensor
    name: str
    source: str
    twins: tuple[str, ...] = ()
    template: State = field(default_factory=dict)
    result: State = field(default_factory=dict)

    def label(self, state: str) -> str:
        """For people."""
        return f"{self.name}[{state}]"


def plan_states(plan: ParameterPlan, catalog: Catalog, findings: Findings) -> bool:
    """Check that the source holds what the optimizer keeps for this parameter, and nothing else.

    False where states are missing or do not fit; then the parameter's state is best left alone.
    """
    tensor = catalog.tensors[plan.source]
    stored = set(tensor.states) - {"value"}
    good = True
    for state, kept in plan.template.items():
        if state in tensor.states:
            good &= _fits(plan, state, kept, tensor.states[state], findings)
        elif state in tensor.scalars:
            good &= _scalar_fits(plan, state, kept, tensor.scalars[state], findings)
        elif kept is not None:
            findings.missing(plan.label(state), state, [*stored, *tensor.scalars])
            good = False
    for state in sorted(stored - plan.template.keys()):
        findings.add("unexpected", plan.label(state), "the target's optimizer keeps no such state")
    for twin in (catalog.tensors[name] for name in plan.twins):
        if (twin.states, twin.scalars) != (tensor.states, tensor.scalars):
            findings.add(
                "ties", plan.name, f"tied in the target, but the states of {plan.source} and {twin.name} differ"
            )
            good = False
    return good


def _fits(plan: ParameterPlan, state: str, kept: Any, spec: TensorSpec, findings: Findings) -> bool:
    if kept is not None and not isinstance(kept, torch.Tensor):
        findings.add("shape", plan.label(state), f"a tensor in the source, a {type(kept).__name__} in the target")
        return False
    dtype = plan.parameter.dtype if kept is None else kept.dtype
    if spec.shape == tuple(plan.parameter.shape):
        return check_dtype(findings, plan.name, state, spec.dtype, dtype)
    if isinstance(plan.parameter, DTensor) and spec.shape:
        findings.add(
            "shape", plan.label(state), f"no layout is known for {list(spec.shape)} beside a sharded parameter"
        )
        return False
    if kept is not None and kept.ndim != len(spec.shape):
        findings.add("shape", plan.label(state), f"{list(spec.shape)} in the source, {kept.ndim} dims in the target")
        return False
    return check_dtype(findings, plan.name, state, spec.dtype, dtype)


def _scalar_fits(plan: ParameterPlan, state: str, kept: Any, scalar: Scalar, findings: Findings) -> bool:
    if isinstance(kept, torch.Tensor) and kept.numel() == 1:
        return check_number(findings, plan.label(state), scalar.value, kept.dtype)
    if isinstance(kept, bool | int | float):
        return check_number(findings, plan.label(state), scalar.value, _dtype(kept))
    if kept is None:
        return True
    findings.add("shape", plan.label(state), f"a number in the source, a {type(kept).__name__} in the target")
    return False


def _dtype(number: float) -> torch.dtype:
    """What holds any number of the same Python type."""
    if isinstance(number, bool):
        return torch.bool
    return torch.int64 if isinstance(number, int) else torch.float64


def allocate(plan: ParameterPlan, catalog: Catalog, supply: Supply) -> list[Fill]:
    """Make the new state in `plan.result`, reusing tensors that fit, and say how to fill it."""
    tensor = catalog.tensors[plan.source]
    fills: list[Fill] = []
    for state, kept in plan.template.items():
        if state in tensor.states:
            made = _room(plan.parameter, kept, tensor.states[state])
            fills += supply.fills(made, plan.source, state, plan.twins)
        elif state in tensor.scalars:
            made = _number(kept, tensor.scalars[state])
        else:
            made = kept
        plan.result[state] = made
    return fills


def _room(parameter: torch.Tensor, kept: Any, spec: TensorSpec) -> torch.Tensor:
    """A tensor for a state: the one that is there, else one laid out as the parameter is."""
    dtype = parameter.dtype if kept is None else kept.dtype
    like = spec.shape == tuple(parameter.shape)
    if isinstance(kept, torch.Tensor) and tuple(kept.shape) == spec.shape:
        same = not like or isinstance(kept, DTensor) == isinstance(parameter, DTensor)
        if same and kept.device == parameter.device and kept._base is None:
            return kept
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
