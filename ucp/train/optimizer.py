"""Optimizers: their state per parameter, made and filled under the parameter's name."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ucp.catalog import Catalog, Scalar
from ucp.plan import TensorSpec
from ucp.train.fit import check_dtype
from ucp.train.report import Findings
from ucp.train.transfer import Fill

State = dict[str, Any]


@dataclass(slots=True)
class ParameterPlan:
    """The state that a parameter will have: `template` as the optimizer keeps it, filled from tensor `source`."""

    parameter: torch.Tensor
    name: str
    source: str
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
        return True
    if isinstance(kept, int | float) or kept is None:
        if isinstance(kept, int) and scalar.value != int(scalar.value):
            findings.add("dtype", plan.label(state), f"{scalar.value} in the source, an integer in the target")
            return False
        return True
    findings.add("shape", plan.label(state), f"a number in the source, a {type(kept).__name__} in the target")
    return False


def allocate(plan: ParameterPlan, catalog: Catalog) -> list[Fill]:
    """Make the new state in `plan.result`, reusing tensors that fit, and say how to fill it."""
    tensor = catalog.tensors[plan.source]
    fills: list[Fill] = []
    for state, kept in plan.template.items():
        if state in tensor.states:
            made = _room(plan.parameter, kept, tensor.states[state])
            fills.append(Fill(made, catalog.cover(plan.source, state)))
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
    """
    state = optimizer.state.get(parameter)
    if state:
        return dict(state)
    shape = tuple(min(2, n) for n in parameter.shape)
    key = (id(optimizer), id(group["params"]), shape, parameter.dtype, parameter.device)
    if key not in known:
        known[key] = _first_state(optimizer, group, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    # Copies: a state that happens to have the parameter's own shape is filled in place, and belongs to it alone.
    return {name: kept.clone() if isinstance(kept, torch.Tensor) else kept for name, kept in known[key].items()}


def _first_state(optimizer: Optimizer, group: Mapping[str, Any], zeros: torch.Tensor) -> State:
    dummy = torch.nn.Parameter(zeros)
    dummy.grad = torch.zeros_like(dummy)
    twin: Any = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [dummy]}]
    # The instance's own `step` may be a learning-rate scheduler's, which counts calls.
    type(optimizer).step(twin)
    return dict(twin.state[dummy])


def stored_template(catalog: Catalog, source: str) -> State:
    """The state as the source has it, for an optimizer that does not step on a tensor of zeros."""
    tensor = catalog.tensors[source]
    found: State = {
        state: torch.empty([min(2, n) for n in spec.shape], dtype=getattr(torch, spec.dtype))
        for state, spec in tensor.states.items()
        if state != "value"
    }
    for name, scalar in tensor.scalars.items():
        plain = scalar.dtype in ("int", "float", "bool")
        found[name] = scalar.value if plain else torch.tensor(scalar.value, dtype=getattr(torch, scalar.dtype))
    return found
