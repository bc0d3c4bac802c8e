"""What each tensor's folder holds, so that DeepSpeed's loaders take it: states, zeros for missing ones, one step.

ZeRO flattens the parameters of an optimizer group into one tensor with one set of states and one step, so every
parameter of a group must come with the same states and the same step (deepspeed/runtime/base_optimizer.py,
load_hp_checkpoint_state_from_checkpoint_dir; deepspeed/utils/tensor_fragment.py, map_to_flat_opt_states).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ucp.catalog import Catalog, ParamGroup, Scalar, Tensor
from ucp.errors import FitError
from ucp.plan import TensorSpec

from .names import check_name

ADAM = frozenset({"exp_avg", "exp_avg_sq"})
"""The optimizer states that ZeRO-3 loads, by name; it neither asks for nor takes others (runtime/zero/stage3.py)."""

_STARTS_AS_ZERO = ADAM | {"max_exp_avg_sq", "momentum_buffer"}
_STATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TAKEN = frozenset({"fp32", "step"})


@dataclass(frozen=True, slots=True)
class Folder:
    """The content of ``zero/<name>/``: `states` to copy from the source, `zeros` to make up, and a step."""

    name: str
    states: tuple[str, ...]
    zeros: Mapping[str, TensorSpec] = field(default_factory=dict)
    step: Scalar | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """All folders, the optimizer groups, the step that all groups share, and what a user should know.

    `zero3` says whether a ZeRO-3 job may load this: not where it would drop a state or take one group's step for all.
    """

    folders: tuple[Folder, ...]
    groups: tuple[ParamGroup, ...]
    step: Scalar | None
    zero3: bool
    notes: tuple[str, ...]


def content(catalog: Catalog) -> Content:
    """Arrange the tensors of `catalog`.

    FitError for states that DeepSpeed has no place for: of another shape than the parameter, missing where they do not
    start as zero, with different steps within a group, or where the source does not tell whose states are whose.
    """
    catalog.require_decided()
    notes: list[str] = []
    groups = _groups(catalog)
    folders: dict[str, Folder] = {}
    for number, group in enumerate(groups):
        members = [catalog.tensors[name] for name in group.params]
        folders.update((folder.name, folder) for folder in _group(number, members, notes))
    for tensor in catalog.tensors.values():
        if tensor.name not in folders:
            check_name(tensor.name)
            folders[tensor.name] = Folder(tensor.name, ("value",))
    _note_scalars(catalog, notes)
    step, zero3 = _zero3(folders, notes)
    return Content(tuple(folders.values()), groups, step, zero3, tuple(notes))


def _groups(catalog: Catalog) -> tuple[ParamGroup, ...]:
    """The optimizer groups with their trained parameters, which are all that ZeRO keeps; one where there are none."""
    trained = [name for name, tensor in catalog.tensors.items() if tensor.kind == "parameter"]
    if not catalog.param_groups:
        return (ParamGroup(tuple(trained), {}),)
    known = set(trained)
    named = [dict.fromkeys(map(catalog.resolve, group.params)) for group in catalog.param_groups]
    return tuple(
        replace(group, params=tuple(name for name in names if name in known))
        for group, names in zip(catalog.param_groups, named, strict=True)
    )


def _group(number: int, members: list[Tensor], notes: list[str]) -> Iterator[Folder]:
    """Folders of one optimizer group."""
    wanted = dict.fromkeys(state for tensor in members for state in tensor.states)
    step = _common_step(number, members)
    made_up = []
    for tensor in members:
        check_name(tensor.name)
        for state, spec in tensor.states.items():
            _check_state(tensor, state, spec)
        zeros = {state: _zero(tensor, state) for state in wanted if state not in tensor.states}
        if zeros or (step is not None and "step" not in tensor.scalars):
            made_up.append(tensor.name)
        yield Folder(tensor.name, tuple(tensor.states), zeros, step)
    if made_up:
        notes.append(
            f"{len(made_up)} parameters never took an optimizer step ({made_up[0]}, …): their states are written as "
            "zeros with the step of their group, which is what ZeRO itself gives such parameters"
        )


def _common_step(number: int, members: list[Tensor]) -> Scalar | None:
    steps = {tensor.scalars["step"].value: tensor for tensor in members if "step" in tensor.scalars}
    if len(steps) > 1:
        (a, first), (b, second), *_ = steps.items()
        raise FitError(
            f"optimizer group {number}: {first.name} is at step {a} and {second.name} at step {b}, "
            "but ZeRO keeps one step per group",
            hint="resume from the universal form with ucp.load, which keeps a step per parameter",
        )
    return next((tensor.scalars["step"] for tensor in steps.values()), None)


def _check_state(tensor: Tensor, state: str, spec: TensorSpec) -> None:
    if state in _TAKEN or not _STATE_NAME.fullmatch(state):
        raise FitError(f"{tensor.name}: a state named {state!r} cannot be a file beside fp32.pt and step.pt")
    if spec.shape != tensor.states["value"].shape:
        raise FitError(
            f"{tensor.name}: state {state!r} has shape {list(spec.shape)}, and a DeepSpeed universal folder holds only "
            f"states of the parameter's own shape {list(tensor.states['value'].shape)}",
            hint="resume from the universal form with ucp.load, which keeps states of any shape",
        )


def _zero(tensor: Tensor, state: str) -> TensorSpec:
    if state not in _STARTS_AS_ZERO:
        raise FitError(
            f"{tensor.name}: has no state {state!r}, which others of its optimizer group have; DeepSpeed needs it and "
            "it is not known to start as zero",
            hint="resume from the universal form with ucp.load",
        )
    return TensorSpec(tensor.states["value"].shape, "float32")


def _note_scalars(catalog: Catalog, notes: list[str]) -> None:
    others = sorted({scalar for tensor in catalog.tensors.values() for scalar in tensor.scalars} - {"step"})
    if others:
        notes.append(f"not carried, DeepSpeed's universal loader knows no scalar but the step: {', '.join(others)}")


def _zero3(folders: Mapping[str, Folder], notes: list[str]) -> tuple[Scalar | None, bool]:
    """The step of all parameters, and whether ZeRO-3 takes all there is or refuses by itself."""
    optimized = [folder for folder in folders.values() if len(folder.states) + len(folder.zeros) > 1 or folder.step]
    states = {state for folder in optimized for state in (*folder.states, *folder.zeros)} - {"value"}
    steps = {folder.step.value: folder.step for folder in optimized if folder.step is not None}
    if states > ADAM:
        extra = states - ADAM
        notes.append(f"not for ZeRO-3, which would drop {', '.join(sorted(extra))}: resume under ZeRO-1 or 2")
        return None, False
    if len(steps) > 1:
        notes.append("not for ZeRO-3, which has one step for all groups: resume under ZeRO-1 or 2")
        return None, False
    if states and not states >= ADAM:
        found = ", ".join(sorted(states))
        notes.append(f"ZeRO-3 loads Adam's states alone, these are {found}: resume under ZeRO-1 or 2")
    return next(iter(steps.values()), None), True
