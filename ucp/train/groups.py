"""Hyper-parameters: matched by the names of the parameters they belong to, never by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ucp.catalog import Catalog, ParamGroup
from ucp.train.report import Findings
from ucp.tree import Opaque, TensorLeaf, Tree

_OWN = frozenset({"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"})
"""Entries that say what a group is or how this machine computes, and stay the target's."""

_SET_BY_SCHEDULERS = frozenset({"initial_lr"})

_ALGORITHM = frozenset({"decoupled_weight_decay"})
"""Entries that make another optimizer of it: AdamW would go on as Adam (torch/optim/adam.py). They stay the target's,
and must be the source's wherever weights decay at all."""


def source_groups(catalog: Catalog, sources: Sequence[str]) -> dict[int, list[str]]:
    """Number of a source group -> those of the source tensors `sources` that are in it; -1 for none."""
    homes: dict[str, int] = {}
    for number, group in enumerate(catalog.param_groups):
        for name in group.params:
            homes.setdefault(catalog.ties.get(name, name), number)
    found: dict[int, list[str]] = {}
    for source in sources:
        found.setdefault(homes.get(source, -1), []).append(source)
    return found


def plan_options(
    catalog: Catalog, number: int, group: Mapping[str, Any], sources: Sequence[str], findings: Findings
) -> dict[str, Any]:
    """The hyper-parameters that target group `number`, whose parameters are `sources`, takes from the source.

    A problem for parameters of several source groups that differ in what the target group holds once, and for
    parameters in no source group.
    """
    subject = f"group {number}"
    homes = source_groups(catalog, sources)
    if -1 in homes:
        findings.add("hyper-parameters", subject, f"the source has no group with {few(homes.pop(-1))}")
    options: dict[str, Any] = {}
    for key in _keys(group, [catalog.param_groups[home] for home in homes]):
        values = {home: _plain(catalog.param_groups[home].options[key]) for home in homes if _has(catalog, home, key)}
        first = next(iter(values.values()))
        if any(value != first for value in values.values()) or len(values) < len(homes):
            told = "; ".join(f"{values.get(home, 'none')} for {few(homes[home])}" for home in homes)
            findings.add("hyper-parameters", f"{subject} {key}", told)
        elif key in _ALGORITHM:
            decays = any(catalog.param_groups[home].options.get("weight_decay") for home in homes)
            if decays and group.get(key) != first:
                told = f"{first} in the source, {group.get(key)} in the target"
                findings.add("hyper-parameters", f"{subject} {key}", told)
        elif not isinstance(first, Opaque | TensorLeaf):
            options[key] = _as_kept(group.get(key), first)
    kept = sorted(set(group) - _OWN - _SET_BY_SCHEDULERS - _ALGORITHM - options.keys())
    if "lr" in kept and homes and f"{subject} lr" not in findings.subjects("hyper-parameters"):
        findings.add("hyper-parameters", f"{subject} lr", "the source has none")
    elif kept:
        findings.notes.append(f"{subject} keeps its own {', '.join(kept)}: the source has none")
    known = {key for home in homes for key in catalog.param_groups[home].options}
    if lost := sorted(known - _OWN - _SET_BY_SCHEDULERS - group.keys()):
        findings.notes.append(f"{subject} has no {', '.join(lost)}, which the source has")
    return options


def install_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Set hyper-parameters; a learning rate that is a tensor stays the same tensor."""
    for key, value in options.items():
        kept = group.get(key)
        if isinstance(kept, torch.Tensor):
            kept.fill_(value)
        else:
            group[key] = value


def plan_group_step(
    catalog: Catalog, number: int, group: Mapping[str, Any], sources: Sequence[str], findings: Findings
) -> dict[str, Any]:
    """``{"step": …}`` for optimizers that count steps once per group (apex and DeepSpeed FusedAdam), else nothing."""
    if "step" not in group:
        return {}
    steps = {catalog.tensors[s].scalars["step"].value for s in sources if "step" in catalog.tensors[s].scalars}
    if len(steps) > 1:
        findings.add("hyper-parameters", f"group {number} step", f"its parameters made {sorted(steps)} steps")
    return {"step": int(steps.pop())} if len(steps) == 1 else {}


def _keys(group: Mapping[str, Any], homes: Sequence[ParamGroup]) -> list[str]:
    wanted = (set(group) | _SET_BY_SCHEDULERS) - _OWN
    return [key for key in dict.fromkeys(key for home in homes for key in home.options) if key in wanted]


def _has(catalog: Catalog, home: int, key: str) -> bool:
    return key in catalog.param_groups[home].options


def _plain(value: Tree) -> Tree:
    return tuple(value) if isinstance(value, list) else value


def _as_kept(kept: Any, value: Any) -> Any:
    return list(value) if isinstance(kept, list) and isinstance(value, tuple) else value


def few(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
