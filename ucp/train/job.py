"""Preparing a load: what will be filled from where, and everything that does not fit, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ucp.catalog import Catalog
from ucp.errors import FitError
from ucp.store import Store
from ucp.train.fit import check_number, check_tensor
from ucp.train.groups import few, plan_group_step, plan_options, source_groups
from ucp.train.names import Rename, match, renamed, selected, stripped, unused
from ucp.train.optimizer import ParameterPlan, State, plan_states, template
from ucp.train.report import Findings
from ucp.train.scheduler import plan_scheduler
from ucp.train.shares import Supply
from ucp.train.targets import Slot, Targets
from ucp.train.transfer import Fill

Group = dict[str, Any]


@dataclass(slots=True)
class Job:
    """A load being prepared.

    `catalog` holds the source's tensors as the target sees them, and `supply` says what fills them. `sources` maps
    names of the target to those of the source; `fills` and `numbers` are what goes into tensors that are there;
    `states`, `stateless`, `groups` and `schedules` are installed once all bytes were read.
    """

    catalog: Catalog
    supply: Supply
    store: Store
    targets: Targets
    rename: Rename | None
    only: tuple[str, ...] | None
    findings: Findings = field(default_factory=Findings)
    sources: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    fills: list[Fill] = field(default_factory=list)
    numbers: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    states: list[tuple[Optimizer, ParameterPlan]] = field(default_factory=list)
    stateless: list[tuple[Optimizer, torch.Tensor]] = field(default_factory=list)
    groups: list[tuple[Group, dict[str, Any]]] = field(default_factory=list)
    schedules: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def source_of(self, parameter: torch.Tensor) -> tuple[str, str] | None:
        """(target name, source name) of an optimizer's parameter, None where the source lacks or `only` excludes it."""
        names = (name for name in self.targets.names_of(parameter) if name in self.sources)
        return next(((name, self.sources[name]) for name in names if selected(name, self.only)), None)

    def twins_of(self, parameter: torch.Tensor, source: str) -> tuple[str, ...]:
        """Further tensors of the source that are tied to `source` in the target by this parameter."""
        known = (self.sources.get(name, source) for name in self.targets.names_of(parameter))
        return tuple(dict.fromkeys(other for other in known if other != source))


def plan(job: Job, *, hyper_parameters: bool) -> None:
    """Fill in everything but the first six fields of `job`; what does not fit goes to its findings."""
    names = job.targets.names()
    job.sources = match(names, job.catalog, job.rename)
    for name in unused(job.rename, names):
        job.findings.add("map", name, "no such name in the target")
    for slot in job.targets.slots:
        if any(selected(name, job.only) for name in slot.names):
            _plan_slot(job, slot)
    for optimizer in job.targets.optimizers:
        _plan_optimizer(job, optimizer, hyper_parameters=hyper_parameters)
    for scheduler in job.targets.schedulers:
        homes = _homes(job, scheduler.optimizer) if hasattr(scheduler, "optimizer") else None
        job.schedules.append((scheduler, plan_scheduler(job.catalog, job.store, scheduler, homes, job.findings)))
    _find_unexpected(job)
    _find_nothing(job, names)


def _find_nothing(job: Job, names: Sequence[str]) -> None:
    """Globs that select nothing, and a load that would fill nothing, are mistakes even where gaps are allowed."""
    for glob in job.only or ():
        if not any(selected(name, [glob]) for name in (*names, *job.catalog.tensors, *job.catalog.ties)):
            job.findings.add("only", glob, "selects nothing")
    if not job.used:
        job.findings.add("names", "all", f"the source has none of the target's, such as {names[0]}")
    if job.targets.transient:
        kept = job.targets.transient
        job.findings.notes.append(f"buffers that are in no checkpoint stay as they are: {few(kept)}")


def _plan_slot(job: Job, slot: Slot) -> None:
    found: dict[str, str] = {}
    for name in slot.names:
        if name in job.sources:
            found.setdefault(job.sources[name], name)
            if name != job.sources[name] and name not in job.catalog.ties:
                job.findings.renamed[name] = job.sources[name]
    if not found:
        wanted = renamed(slot.names[0], job.rename)
        job.findings.missing(slot.label, stripped(wanted), [*job.catalog.tensors, *job.catalog.ties])
        return
    job.used.update(found)
    source, *others = found
    tensor = job.catalog.tensors[source]
    if slot.state in tensor.states:
        twins = [other for other in others if _same(job, slot, source, other)]
        if check_tensor(job.findings, found[source], slot.state, tensor.states[slot.state], slot.tensor):
            job.fills += job.supply.fills(slot.tensor, source, slot.state, twins)
    elif slot.state in tensor.scalars:
        _plan_number(job, slot, source)
    elif tensor.undecided is not None:
        job.findings.undecided(slot.label, tensor.undecided)
    else:
        job.findings.missing(slot.label, slot.state, [*tensor.states, *tensor.scalars])


def _same(job: Job, slot: Slot, source: str, other: str) -> bool:
    """Whether the source may hold one tensor of the target under two names: reading then compares their contents."""
    mine = job.catalog.tensors[source].states[slot.state]
    if job.catalog.tensors[other].states.get(slot.state) == mine:
        return True
    job.findings.add("ties", slot.label, f"tied in the target, but {source} and {other} differ in the source")
    return False


def _plan_number(job: Job, slot: Slot, source: str) -> None:
    value = job.catalog.tensors[source].scalars[slot.state].value
    if slot.tensor.numel() != 1:
        job.findings.add("shape", slot.label, f"a number in the source, {list(slot.tensor.shape)} in the target")
    elif check_number(job.findings, slot.label, value, slot.tensor.dtype):
        job.numbers.append((slot.tensor, value))


def _plan_optimizer(job: Job, optimizer: Optimizer, *, hyper_parameters: bool) -> None:
    templates: dict[Any, State] = {}
    for number, group in enumerate(optimizer.param_groups):
        known = [(p, *pair) for p in group["params"] if (pair := job.source_of(p)) is not None]
        sources = [source for _, _, source in known]
        options: dict[str, Any] = {}
        if sources and _all_selected(job, group, number):
            if hyper_parameters:
                options = plan_options(job.catalog, number, group, sources, job.findings)
            options = {**plan_group_step(job.catalog, number, group, sources, job.findings), **options}
            job.groups.append((group, options))
        try:
            for parameter, name, source in known:
                made = ParameterPlan(parameter, name, source, job.twins_of(parameter, source))
                _plan_parameter(job, optimizer, {**group, **options}, made, templates)
        except FitError as error:
            job.findings.add("optimizer", f"group {number}", error.message)
    if job.findings.without_state and not any(_has_state(job.catalog, name) for name in job.catalog.tensors):
        job.findings.add("missing", "optimizer state", "the source holds none; load the module alone")
        job.stateless.clear()


def _all_selected(job: Job, group: Group, number: int) -> bool:
    """Whether a whole group is to be loaded; notes parameters without a name."""
    names = [job.targets.names_of(parameter) for parameter in group["params"]]
    for parameter, found in zip(group["params"], names, strict=True):
        if not found:
            job.findings.add(
                "missing", f"a parameter of group {number}", f"{list(parameter.shape)}, in no module given"
            )
    return all(any(selected(name, job.only) for name in found) for found in names if found)


def _plan_parameter(
    job: Job, optimizer: Optimizer, group: Group, made: ParameterPlan, templates: dict[Any, State]
) -> None:
    undecided = job.catalog.tensors[made.source].undecided
    if undecided is not None:
        job.findings.undecided(f"{made.name}[optimizer state]", undecided)
        return
    value = job.catalog.tensors[made.source].states.get("value")
    if value is None or value.shape != tuple(made.parameter.shape):
        return
    made.template = template(optimizer, group, made.parameter, templates)
    if not _has_state(job.catalog, made.source):
        job.stateless.append((optimizer, made.parameter))
        if made.template:
            job.findings.without_state.append(made.name)
    elif plan_states(made, job.catalog, job.findings):
        job.states.append((optimizer, made))


def _has_state(catalog: Catalog, name: str) -> bool:
    tensor = catalog.tensors[name]
    return bool(tensor.scalars) or any(state != "value" for state in tensor.states)


def _homes(job: Job, optimizer: Any) -> Sequence[Sequence[int]]:
    """The source groups that each of an optimizer's groups takes its parameters from."""
    found = []
    for group in optimizer.param_groups:
        sources = [pair[1] for parameter in group["params"] if (pair := job.source_of(parameter)) is not None]
        found.append(sorted(source_groups(job.catalog, sources)))
    return found


def _find_unexpected(job: Job) -> None:
    """Tensors of the source that the target does not hold, and optimizer states that its optimizer does not."""
    optimized = set(_optimized(job))
    aliases: dict[str, list[str]] = {}
    for alias, holder in job.catalog.ties.items():
        aliases.setdefault(holder, []).append(alias)
    for name in job.catalog.tensors:
        if not any(selected(spelling, job.only) for spelling in (name, *aliases.get(name, ()))):
            continue
        if name not in job.used:
            job.findings.add("unexpected", name)
        elif job.targets.optimizers and name not in optimized and _has_state(job.catalog, name):
            job.findings.add("unexpected", f"{name}[optimizer state]", "in no group of the target's optimizer")


def _optimized(job: Job) -> Iterator[str]:
    for optimizer in job.targets.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                pair = job.source_of(parameter)
                yield from () if pair is None else (pair[1], *job.twins_of(parameter, pair[1]))
