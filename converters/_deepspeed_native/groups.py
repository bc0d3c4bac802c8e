"""The optimizer's groups as ZeRO flattens them: parameters in the job's order, one set of states and steps for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.catalog import Catalog, ParamGroup, Scalar, Tensor
from ucp.errors import FitError
from ucp.training import first_rank, other_states
from ucp.tree import Tree

from .partition import collected
from .wanted import zero_options

_STARTS_AS_ZERO = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_UNIVERSAL = "convert to the universal form and resume with ucp.load, which keeps each parameter's own states and step"


@dataclass(slots=True)
class Remarks:
    """What a user should know: `notes`, and `losses`, which are refused unless accepted."""

    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def drop(self, path: str, reason: str) -> None:
        """Note what of the pickled state is left behind."""
        self.notes.append(f"not carried, it would run code when DeepSpeed loads it: {path} ({reason})")


@dataclass(frozen=True, slots=True)
class Group:
    """One optimizer group: its trained parameters in the order of the job's optimizer.

    `states` and `scalars` are what every parameter has or is given.
    """

    params: Mapping[str, Tensor]
    options: Mapping[str, Tree]
    states: tuple[str, ...]
    scalars: Mapping[str, Scalar]

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each parameter."""
        return {name: tensor.states["value"].size for name, tensor in self.params.items()}


def arrange(catalog: Catalog, *, keep_empty: bool, remarks: Remarks) -> tuple[Group, ...]:
    """The groups of `catalog`; those without trained parameters only with `keep_empty`.

    FitError for what DeepSpeed's flat tensors have no place for: states of another shape than their parameter or of no
    floating-point type, states that the source cannot tell apart, states of flat partitions, experts over ranks.
    """
    _refuse(catalog)
    groups = []
    for number, group in enumerate(_named(catalog, remarks)):
        if group.params or keep_empty:
            groups.append(_group(number, group, [catalog.tensors[name] for name in group.params], remarks))
        else:
            remarks.notes.append(
                f"optimizer group {number} trains nothing and is left out: no ZeRO 1 or 2 job has such"
            )
    _note_rounding(groups, remarks)
    _note_of_nobody(catalog, groups, remarks)
    if not any(group.params for group in groups):
        raise FitError(f"{catalog.url}: no parameter is trained, so there is nothing for ZeRO to partition")
    return tuple(groups)


def _refuse(catalog: Catalog) -> None:
    for tensor in catalog.tensors.values():
        if "value" not in tensor.states:
            raise tensor.lacks("value", catalog.url)
    catalog.require_decided()
    if catalog.source.mesh["pp"] > 1 and catalog.program is None and "zero_stage" in catalog.source.detail:
        raise FitError(
            f"{catalog.url}: the source is a pipeline, whose jobs load a file per layer; these are not written yet",
            hint="convert to deepspeed-universal, from which pipelines of any degree resume",
        )
    names = sorted({str(key) for states in other_states(catalog).values() for key in states})
    if names:
        raise FitError(
            f"{catalog.url}: optimizer state {' '.join(names)} is of the source's flat partitions and not of "
            "parameters: it means nothing under another partitioning"
        )
    if any(group.options.get("moe") for group in catalog.param_groups):
        raise FitError(
            f"{catalog.url}: experts of DeepSpeed's MoE lie in files of their own, which are not written yet",
            hint="convert to the universal form and resume with ucp.load",
        )


def _named(catalog: Catalog, remarks: Remarks) -> Sequence[ParamGroup]:
    """The groups with their trained parameters, which are all that ZeRO keeps; one where there are none."""
    trained = {n for n, t in catalog.tensors.items() if t.kind == "parameter" and t.states["value"].size}
    if not catalog.param_groups:
        remarks.notes.append(
            "the source tells no optimizer groups: all parameters are one group, in the order of the model"
        )
        return (ParamGroup(tuple(name for name in catalog.tensors if name in trained), {}),)
    named = [list(dict.fromkeys(map(catalog.resolve, group.params))) for group in catalog.param_groups]
    listed = [name for names in named for name in names]
    twice = next((name for name in listed if listed.count(name) > 1), None) if len(set(listed)) < len(listed) else None
    if twice is not None:
        raise FitError(f"{catalog.url}: {twice} is in two optimizer groups")
    ranks = _dealt_over(catalog)
    return [
        replace(
            group, params=tuple(name for name in (collected(names, dp=ranks) if ranks else names) if name in trained)
        )
        for group, names in zip(catalog.param_groups, named, strict=True)
    ]


def _dealt_over(catalog: Catalog) -> int:
    """Over how many ranks the source dealt its parameters out (``round_robin_gradients``), 0 if it did not.

    Its groups are in the order of the data then; the job's own is the one before (deepspeed/runtime/zero/
    stage_1_and_2.py, ``_round_robin_reorder``).
    """
    zero, state = zero_options(catalog), first_rank(catalog)
    stage, ranks = zero.get("stage"), state.get("dp_world_size")
    wrapped = catalog.source.detail.get("wrapper") != "BF16_Optimizer"
    if not (zero.get("round_robin_gradients") and stage in (1, 2) and isinstance(ranks, int) and wrapped):
        return 0
    return ranks


def _group(number: int, group: ParamGroup, members: list[Tensor], remarks: Remarks) -> Group:
    states = tuple(dict.fromkeys(s for tensor in members for s in tensor.states if s != "value"))
    for tensor in members:
        for state in ("value", *states):
            _check(tensor, state)
    scalars = _scalars(number, members, remarks)
    counted = {"step"} & scalars.keys()
    incomplete = [t.name for t in members if t.states.keys() < {"value", *states} or not counted <= t.scalars.keys()]
    if incomplete:
        remarks.notes.append(
            f"{len(incomplete)} parameters never took an optimizer step ({incomplete[0]}, …): their states are written "
            "as zeros with the step of their group, which is what ZeRO itself gives such parameters"
        )
    if states and not group.options:
        raise FitError(
            f"optimizer group {number} has states and no hyper-parameters, and DeepSpeed would leave the job's "
            "optimizer without a learning rate",
            hint="convert to deepspeed-universal, whose loader keeps the job's own",
        )
    return Group({tensor.name: tensor for tensor in members}, group.options, states, scalars)


def _check(tensor: Tensor, state: str) -> None:
    spec = tensor.states.get(state)
    if spec is None:
        if state not in _STARTS_AS_ZERO:
            raise FitError(
                f"{tensor.name}: has no state {state!r}, which others of its optimizer group have; ZeRO keeps one flat "
                "tensor for all of them, and it is not known to start as zero",
                hint=_UNIVERSAL,
            )
        return
    if spec.shape != tensor.states["value"].shape:
        raise FitError(
            f"{tensor.name}: state {state!r} has shape {list(spec.shape)}, and ZeRO's flat tensors hold only states of "
            f"the parameter's own shape {list(tensor.states['value'].shape)}",
            hint=_UNIVERSAL,
        )
    if spec.dtype not in _FLOATS:
        raise FitError(f"{tensor.name}: {state!r} is {spec.dtype}, and ZeRO keeps float32", hint=_UNIVERSAL)


def _note_rounding(groups: Sequence[Group], remarks: Remarks) -> None:
    tensors = [tensor for group in groups for tensor in group.params.values()]
    wide = [f"{t.name}[{state}]" for t in tensors for state, spec in t.states.items() if spec.dtype == "float64"]
    if wide:
        remarks.losses.append(
            f"{len(wide)} tensors in float64 are rounded to float32, which is what ZeRO keeps ({wide[0]}, …)"
        )


def _note_of_nobody(catalog: Catalog, groups: Sequence[Group], remarks: Remarks) -> None:
    """States of what is frozen, or in no group: ZeRO keeps none of those."""
    grouped = {name for group in groups for name in group.params}
    others = [
        tensor.name
        for tensor in catalog.tensors.values()
        if tensor.name not in grouped and any(spec.size for state, spec in tensor.states.items() if state != "value")
    ]
    if others:
        remarks.losses.append(
            f"optimizer states of {len(others)} tensors are left out, since no group trains them ({others[0]}, …)"
        )


def _scalars(number: int, members: list[Tensor], remarks: Remarks) -> dict[str, Scalar]:
    """One scalar of each name for the whole group: where parameters differ, the largest, which is a loss."""
    found: dict[str, Scalar] = {}
    for name in dict.fromkeys(name for tensor in members for name in tensor.scalars):
        held = [tensor for tensor in members if name in tensor.scalars]
        first = max(held, key=lambda tensor: tensor.scalars[name].value)
        other = next((t for t in held if t.scalars[name].value != first.scalars[name].value), None)
        found[name] = first.scalars[name]
        if other is not None:
            remarks.losses.append(
                f"optimizer group {number}: {name} is {other.scalars[name].value} for {other.name} and "
                f"{found[name].value} for {first.name}; ZeRO keeps one per group, and {found[name].value} is written"
            )
    return found
