"""Optimizers as state dicts: states are tensors that are there, hyper-parameters go to groups of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ucp.train.groups import plan_options
from ucp.train.names import selected
from ucp.train.targets import NamedGroup

if TYPE_CHECKING:
    from ucp.train.job import Job


def plan_named(job: Job, *, hyper_parameters: bool) -> None:
    """Plan the hyper-parameters of groups of names, and note states of the source that these have no room for."""
    for number, group in enumerate(job.targets.named_groups):
        sources = sources_of(job, group)
        if hyper_parameters and sources and all(selected(name, job.only) for name in group.names):
            job.groups.append((group.options, plan_options(job.catalog, number, group.options, sources, job.findings)))
        for name in group.names:
            if name in job.sources and selected(name, job.only):
                _find_unasked(job, name)


def sources_of(job: Job, group: NamedGroup) -> list[str]:
    """The tensors of the source that a group is about."""
    return [job.sources[name] for name in group.names if name in job.sources and selected(name, job.only)]


def _find_unasked(job: Job, name: str) -> None:
    tensor = job.catalog.tensors[job.sources[name]]
    asked = {slot.state for slot in job.targets.slots_named(name)}
    for state in sorted({*tensor.states, *tensor.scalars} - asked - {"value"}):
        job.findings.add("unexpected", f"{name}[{state}]", "the target's optimizer keeps no such state")


def kept_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters without the parameters."""
    return {key: value for key, value in options.items() if key not in ("params", "param_names")}
