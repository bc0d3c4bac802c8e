"""Preparing a load: what will be filled from where, and everything that does not fit, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ucp.catalog import Catalog
from ucp.errors import FitError, NotFoundError
from ucp.lazy import lazy_tree
from ucp.store import Store
from ucp.train.asked import has_state
from ucp.train.fit import check_number, check_slot
from ucp.train.groups import few, plan_group_step, plan_options, source_groups
from ucp.train.items import Item, by_rank
from ucp.train.named import plan_named
from ucp.train.names import Rename, match, renamed, selected, stripped
from ucp.train.optimizer import Member, ParameterPlan, State, plan_states, template
from ucp.train.report import Findings
from ucp.train.resize import resized
from ucp.train.scheduler import STATE, plan_scheduler
from ucp.train.shares import Supply
from ucp.train.state.stateful import Scheduler
from ucp.train.targets import Slot, Targets
from ucp.train.transfer import Fill
from ucp.train.world import world_of

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
    items: list[tuple[Item, Any]] = field(default_factory=list)

    def members_of(self, parameter: torch.Tensor) -> list[Member]:
        """The tensors in an optimizer's parameter, but for those that the source lacks or `only` excludes."""
        found = []
        for slot in self.targets.slots_of(parameter):
            known = [name for name in slot.names if name in self.sources]
            name = next((name for name in known if selected(name, self.only)), None)
            if name is not None:
                sources = dict.fromkeys(self.sources[other] for other in known)
                twins = tuple(other for other in sources if other != self.sources[name])
                found.append(Member(slot, name, self.sources[name], twins))
        return found


def plan(job: Job, *, hyper_parameters: bool) -> None:
    """Fill in everything but the first six fields of `job`; what does not fit goes to its findings.

    What the whole job asks for, and what not, `ucp.train.asked` finds.
    """
    job.sources = match(job.targets.names(), job.catalog, job.rename)
    job.catalog, job.supply, job.findings.resized = resized(
        job.catalog, job.supply, job.targets.slots, job.sources, job.findings.allowed.resize
    )
    for slot in job.targets.slots:
        if any(selected(name, job.only) for name in slot.names):
            _plan_slot(job, slot)
    for optimizer in job.targets.optimizers:
        _plan_optimizer(job, optimizer, hyper_parameters=hyper_parameters)
    plan_named(job, hyper_parameters=hyper_parameters)
    for scheduler in job.targets.schedulers:
        job.schedules.append((scheduler, _schedule(job, scheduler, STATE)))
    for item in job.targets.items.values():
        _plan_item(job, item)
    if job.targets.transient:
        kept = job.targets.transient
        job.findings.notes.append(f"buffers that are in no checkpoint stay as they are: {few(kept)}")


def _schedule(job: Job, scheduler: Any, name: str) -> dict[str, Any]:
    homes = _homes(job, scheduler.optimizer) if hasattr(scheduler, "optimizer") else None
    return plan_scheduler(job.catalog, job.store, scheduler, homes, job.findings, name=name)


def _plan_item(job: Job, item: Item) -> None:
    if isinstance(item, Scheduler):
        if state := _schedule(job, item.object, item.name):
            job.items.append((item, state))
        return
    try:
        told = item.told(job.catalog)
    except NotFoundError:
        job.findings.missing(item.name, item.name, job.catalog.state)
        return
    stored: Any = lazy_tree(job.catalog, job.store, told, item.name)
    try:
        state, note = item.prepare(
            by_rank(stored) if item.per_rank else stored, world=world_of(job.catalog, job.targets)
        )
    except FitError as error:
        job.findings.add("state", item.name, error.message)
        return
    job.items.append((item, state))
    if note:
        job.findings.notes.append(note)


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
        slot.refit(tensor.states[slot.state].shape)
        twins = [other for other in others if _same(job, slot, source, other)]
        if check_slot(job.findings, found[source], slot, tensor.states[slot.state]):
            job.fills += job.supply.fills(slot.held(), source, slot.state, twins)
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
        known = [(parameter, members) for parameter in group["params"] if (members := job.members_of(parameter))]
        sources = [member.source for _, members in known for member in members]
        options: dict[str, Any] = {}
        if sources and _all_selected(job, group, number):
            if hyper_parameters:
                options = plan_options(job.catalog, number, group, sources, job.findings)
            options = {**plan_group_step(job.catalog, number, group, sources, job.findings), **options}
            job.groups.append((group, options))
        try:
            for parameter, members in known:
                _plan_parameter(job, optimizer, {**group, **options}, ParameterPlan(parameter, members), templates)
        except FitError as error:
            job.findings.add("optimizer", f"group {number}", error.message)
    stateless = not any(has_state(tensor) for tensor in job.catalog.tensors.values())
    # An optimizer that was saved before its first step left its groups.
    if job.findings.without_state and stateless and not job.catalog.param_groups:
        job.findings.add("missing", "optimizer state", "the source holds none; load the module alone")
        job.stateless.clear()


def _all_selected(job: Job, group: Group, number: int) -> bool:
    """Whether a whole group is to be loaded; notes parameters without a name."""
    slots = [slot for parameter in group["params"] for slot in job.targets.slots_of(parameter)]
    for parameter in group["params"]:
        if not job.targets.slots_of(parameter):
            job.findings.add(
                "missing", f"a parameter of group {number}", f"{list(parameter.shape)}, in no module given"
            )
    return all(any(selected(name, job.only) for name in slot.names) for slot in slots)


def _plan_parameter(
    job: Job, optimizer: Optimizer, group: Group, made: ParameterPlan, templates: dict[Any, State]
) -> None:
    for member in made.members:
        undecided = job.catalog.tensors[member.source].undecided
        if undecided is not None:
            job.findings.undecided(f"{member.name}[optimizer state]", undecided)
            return
        value = job.catalog.tensors[member.source].states.get("value")
        if value is None or value.shape != member.slot.shape:
            return
    if not made.parameter.numel() and all(member.slot.empty for member in made.members):
        # The optimizer never has a gradient for it on this rank, and so no state.
        job.stateless.append((optimizer, made.parameter))
        return
    _check_rest(job, optimizer, made)
    made.template = template(optimizer, group, made.parameter, templates)
    without = [member.name for member in made.members if not has_state(job.catalog.tensors[member.source])]
    if len(without) == len(made.members):
        job.stateless.append((optimizer, made.parameter))
        if made.template:
            job.findings.without_state += without
    elif plan_states(made, job.catalog, job.findings):
        job.states.append((optimizer, made))
    elif len(made.members) > 1:
        names = few([member.name for member in made.members])
        job.findings.notes.append(f"one flat parameter holds {names}: none of them gets optimizer states")


def _check_rest(job: Job, optimizer: Optimizer, made: ParameterPlan) -> None:
    """Flat memory has one count of steps: what stays as it is in there must have made as many as what is loaded."""
    filled = {id(member.slot) for member in made.members}
    rest = [slot.label for slot in job.targets.slots_of(made.parameter) if id(slot) not in filled]
    first = made.members[0]
    for state, number in job.catalog.tensors[first.source].scalars.items():
        kept = optimizer.state.get(made.parameter, {}).get(state)
        if rest and kept is not None and float(kept) != number.value:
            told = f"in one flat parameter with {first.name}, whose {state} is {number.value} in the source, not {kept}"
            job.findings.add("hyper-parameters", few(rest), told)


def _homes(job: Job, optimizer: Any) -> Sequence[Sequence[int]]:
    """The source groups that each of an optimizer's groups takes its parameters from."""
    found = []
    for group in optimizer.param_groups:
        sources = [member.source for parameter in group["params"] for member in job.members_of(parameter)]
        found.append(sorted(source_groups(job.catalog, sources)))
    return found
