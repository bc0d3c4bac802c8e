"""Param groups as Megatron-Core's optimizers look for them.

A job makes its groups by itself and asks the checkpoint for the hyper-parameters of each, by four of them
(``param_group_identifier_keys`` in megatron/core/optimizer/optimizer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ucp.catalog import Catalog, ParamGroup
from ucp.errors import FitError
from ucp.tree import Tree

from .write_choice import is_trained

_EXPERTS = re.compile(r"layers\.\d+\.moe\.(gate|up|down)(_bias)?")
_NEEDED: dict[str, Tree] = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""Without these an optimizer cannot step; the values of Megatron-LM where a source has none."""

_ASKED: dict[str, Tree] = {"default_config": True, "bias_correction": True}
"""What logging and the optimizer of Transformer Engine look up in a group."""

_NOT_COMPARED = frozenset({"params", "step", "is_expert_parallel"})

Identity = tuple[float, float, bool, bool]
"""Multipliers of weight decay and of the learning rate; whether of experts under ep > 1; whether lr is decoupled."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """A catalog with groups as Megatron-Core has them, and what of the source's that could not keep."""

    catalog: Catalog
    losses: tuple[str, ...]
    notes: tuple[str, ...]
    step: int


def regroup(catalog: Catalog, *, ep: int) -> Grouped:
    """The parameters of `catalog` by what identifies Megatron-Core's groups.

    Where hyper-parameters differ within a group, those of its first parameter are taken, and the difference is a loss.
    FitError where nothing tells the optimizer's step.
    """
    ties = catalog.ties
    homes = {ties.get(name, name): group.options for group in catalog.param_groups for name in group.params}
    held: dict[Identity, dict[str, Mapping[str, Tree]]] = {}
    for name, tensor in catalog.tensors.items():
        if is_trained(tensor):
            options = homes.get(name, {})
            held.setdefault(_identity(catalog, name, options, ep), {})[name] = options
    step, losses = _step(catalog)
    losses += _of_frozen(catalog)
    notes = list(_frozen(catalog))
    groups = []
    for identity in sorted(held, key=lambda one: (one[2], -one[0], one[1], one[3])):
        members = held[identity]
        losses += _differing(members)
        options = _plain(next(iter(members.values())))
        losses += _made_up(next(iter(members)), options)
        notes += _decay(identity, options)
        groups.append(ParamGroup(tuple(members), {**_NEEDED, **_ASKED, **options, **_named(identity), "step": step}))
    return Grouped(replace(catalog, param_groups=tuple(groups)), tuple(dict.fromkeys(losses)), tuple(notes), step)


def _frozen(catalog: Catalog) -> Iterator[str]:
    names = [name for name, tensor in catalog.tensors.items() if tensor.kind == "frozen"]
    if names:
        yield f"{len(names)} tensors, such as {names[0]}, are frozen and have no states: freeze them in the job too"


def _of_frozen(catalog: Catalog) -> Iterator[str]:
    """Moments of what the job will not train."""
    names = [n for n, tensor in catalog.tensors.items() if not is_trained(tensor) and set(tensor.states) - {"value"}]
    if names:
        yield f"optimizer states of {len(names)} tensors that are not trained, such as {names[0]}, are left out"


def _identity(catalog: Catalog, name: str, options: Mapping[str, Tree], ep: int) -> Identity:
    def told(key: str, default: Any) -> Any:
        # NeMo writes pre_wd_mult and pre_lr_mult.
        return options.get(key, options.get(f"pre_{key}", default))

    flat = len(catalog.tensors[name].states["value"].shape) == 1 or name.endswith((".bias", "_bias"))
    decay, rate = told("wd_mult", 0.0 if flat else 1.0), told("lr_mult", 1.0)
    expert = ep > 1 and _EXPERTS.fullmatch(name) is not None
    return float(decay), float(rate), expert, bool(told("is_decoupled_lr", False))


def _named(identity: Identity) -> dict[str, Tree]:
    wd_mult, lr_mult, expert, decoupled = identity
    return {"wd_mult": wd_mult, "lr_mult": lr_mult, "is_expert_parallel": expert, "is_decoupled_lr": decoupled}


def _plain(options: Mapping[str, Tree]) -> dict[str, Tree]:
    """Options that are plain values, which is all that Megatron-Core's groups have."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return {
        str(key): value
        for key, value in plain.items()
        if key not in ("params", "step") and (value is None or isinstance(value, bool | int | float | str | tuple))
    }


def _differing(members: Mapping[str, Mapping[str, Tree]]) -> Iterator[str]:
    """Options that the members of a group do not agree on."""
    (first, options), *others = members.items()
    seen: set[str] = set()
    for name, other in others:
        if other is options:
            continue
        for key in sorted({*options, *other} - _NOT_COMPARED - seen):
            if repr(options.get(key)) != repr(other.get(key)):
                seen.add(key)
                one, two = options.get(key), other.get(key)
                yield f"{key} is {one} of {first} and {two} of {name}: they are one group, and the first is kept"


def _made_up(name: str, options: Mapping[str, Tree]) -> Iterator[str]:
    lacking = [key for key in _NEEDED if key not in options]
    if lacking:
        made = ", ".join(f"{key}={_NEEDED[key]}" for key in lacking)
        yield f"the source has no {' '.join(lacking)} for the group of {name}; written: {made}"


def _decay(identity: Identity, options: Mapping[str, Tree]) -> Iterator[str]:
    if identity[0] == 0 and "wd_mult" not in options and "pre_wd_mult" not in options and options.get("weight_decay"):
        yield (
            f"the source decays norms and biases by {options['weight_decay']}; Megatron's own groups do not, and its "
            "scheduler will set 0"
        )


def _step(catalog: Catalog) -> tuple[int, list[str]]:
    """The one step that Megatron-Core has for all parameters, and a loss where the source's differ."""
    steps: dict[int, str] = {}
    for name, tensor in catalog.tensors.items():
        if is_trained(tensor) and "step" in tensor.scalars:
            steps.setdefault(int(tensor.scalars["step"].value), name)
    for group in catalog.param_groups if not steps else ():
        own = group.options.get("step")
        if isinstance(own, int | float) and group.params:
            steps.setdefault(int(own), group.params[0])
    if not steps and catalog.step is None:
        raise FitError(
            f"{catalog.url}: nothing tells how many steps the optimizer took",
            hint="write the weights alone with optimizer=none",
        )
    step = max(steps, default=catalog.step or 0)
    if len(steps) < 2:
        return step, []
    least = min(steps)
    return step, [
        f"steps differ, {step} of {steps[step]} and {least} of {steps[least]}: Megatron-Core keeps one, the larger"
    ]
