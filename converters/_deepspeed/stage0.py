"""Reads the optimizer inside the model file: ZeRO 0.

In fp32 it is the torch optimizer's own state dict, keyed by number. In fp16 and bf16 one of two wrappers saves fp32
masters beside it: per parameter (``fp32_groups``, deepspeed/runtime/fp16/unfused_optimizer.py) or one flat tensor per
group (``fp32_groups_flat``, deepspeed/runtime/fp16/fused_optimizer.py). Names are nowhere saved, unless the optimizer
was made with named parameters (``param_names``, torch/optim/optimizer.py); `naming` finds them. States whose parameter
cannot be told are carried as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import ParamGroup
from ucp.errors import CorruptError, FitError
from ucp.layout import Box, Shape
from ucp.plan import Fragment, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from . import nodes
from .experts import named_degree
from .flat import flat_group
from .found import Found, Stored, place, place_group, scalar_of
from .load import RankFile, Save
from .naming import Candidates, Member, Names, flat_names, names_of, undecided
from .same import Comparison
from .stages import stage_names

_BESIDE_OPTIONS = ("params", "param_names")
_UNKNOWN_HINT = "known are torch optimizers and DeepSpeed's FP16_Optimizer and FP16_UnfusedOptimizer"


@dataclass(frozen=True, slots=True)
class Saved:
    """One rank's optimizer: the torch optimizer's groups and states, fp32 masters, and the wrapper's own entries."""

    path: str
    groups: list[dict[str, Tree]]
    states: Mapping[Any, Tree]
    masters: list[Tree] | None
    flat: bool
    rest: dict[str, Tree]

    def numbers(self, group: int) -> list[int]:
        """Numbers of the group's parameters."""
        where = f"{self.path}: param_groups"
        return [nodes.integer(n, where) for n in nodes.sequence(self.groups[group].get("params", ()), where)]

    def state(self, number: int) -> Mapping[str, Tree]:
        """States of one parameter; empty if it never had a gradient."""
        return nodes.named(self.states.get(number, {}), f"{self.path}: optimizer state {number}")


def read_plain_optimizers(
    store: Store,
    save: Save,
    comparison: Comparison,
    candidates: Candidates,
    *,
    degrees: Mapping[str, int] | None = None,
) -> dict[int, Found]:
    """The optimizer of every pipeline stage, with the names found among `candidates`.

    `degrees` has the expert-parallel degree of candidates that are experts. FitError for an unknown structure.
    """
    saved = [_saved(save.model(mp)) for mp in range(save.mesh["pp"])]
    present = [one for one in saved if one is not None]
    if not present:
        return {0: _untrained(candidates)}
    if len(present) < len(saved) or len({(one.flat, len(one.groups)) for one in present}) > 1:
        raise FitError(f"{present[0].path}: pipeline stages have optimizers of different kinds")
    if not present[0].flat:
        return _read_plain(store, present, comparison, candidates, degrees or {})
    if len(present) > 1:
        raise FitError(
            f"{present[0].path}: FP16_Optimizer in a pipeline does not say how parameters lie in its flat masters",
            hint="save with ZeRO 1",
        )
    return {0: _read_flat(store, present[0], comparison, candidates)}


def base_groups_of(file: RankFile) -> list[Mapping[str, Tree]]:
    """Parameter groups of the optimizer in a model file; FitError for an unknown structure."""
    saved = _saved(file)
    return [] if saved is None else list(saved.groups)


def _saved(file: RankFile) -> Saved | None:
    tree = file.root.get("optimizer")
    if tree is None:
        return None
    where = f"{file.path}: optimizer"
    outer = nodes.mapping(tree, where)
    wrapped = [key for key in ("fp32_groups", "fp32_groups_flat") if key in outer]
    base = nodes.mapping(outer.get("optimizer_state_dict"), where) if wrapped else outer
    if not {"state", "param_groups"} <= base.keys():
        raise FitError(f"{where}: entries {', '.join(map(str, outer))} are of no known optimizer", hint=_UNKNOWN_HINT)
    rest = {str(k): v for k, v in outer.items() if wrapped and k not in (*wrapped, "optimizer_state_dict")}
    extra = {str(k): v for k, v in base.items() if k not in ("state", "param_groups")}
    if extra:
        rest["base_optimizer"] = extra
    groups = [dict(nodes.mapping(g, where)) for g in nodes.sequence(base["param_groups"], where)]
    masters = list(nodes.sequence(outer[wrapped[0]], where)) if wrapped else None
    if masters is not None and len(masters) != len(groups):
        raise CorruptError(f"{where}: {len(masters)} groups of masters for {len(groups)} parameter groups")
    states = nodes.mapping(base["state"], where)
    return Saved(file.path, groups, states, masters, "fp32_groups_flat" in wrapped, rest)


def _untrained(candidates: Candidates) -> Found:
    """A model saved with no optimizer at all."""
    found = Found(notes=["no optimizer was saved: values are the module's own"])
    for name, leaf in candidates.leaves.items():
        found.shapes[name] = leaf.extent.shape
        found.add(name, "value", _whole(leaf))
    return found


def _read_plain(
    store: Store,
    saved: Sequence[Saved],
    comparison: Comparison,
    candidates: Candidates,
    degrees: Mapping[str, int],
) -> dict[int, Found]:
    stages = [_members(one) for one in saved]
    hints = [[group.get("param_names") or () for group in one.groups] for one in saved]
    tied: set[str] = set()
    if len(saved) == 1:
        named = [_names_by_degree(store, candidates, saved[0], stages[0], degrees)]
    else:
        named, tied = stage_names(store, candidates, stages, hints, saved[0].path)
    found: dict[int, Found] = {}
    for mp, (one, names, groups) in enumerate(zip(saved, named, stages, strict=True)):
        stage = found[mp] = Found(notes=list(names.notes), rest={0: dict(one.rest)}, tied=tied)
        for g, members in enumerate(groups):
            for name, number, member in zip(names.certain[g], one.numbers(g), members, strict=True):
                if name is None:
                    _carry(stage, {"group": g, "number": number}, member.master, member.state)
                else:
                    _place_member(stage, name, member, candidates.leaves[name], comparison)
            certain = tuple(name for name in names.certain[g] if name is not None)
            stage.groups.append(ParamGroup(certain, _options(one.groups[g])))
        _leave_open(stage, names.open, candidates)
    return found


def _names_by_degree(
    store: Store,
    candidates: Candidates,
    one: Saved,
    groups: Sequence[Sequence[Member]],
    degrees: Mapping[str, int],
) -> Names:
    """Names of a rank's members. A group of experts has experts of one degree alone, the other groups none."""
    hints = [group.get("param_names") or () for group in one.groups]
    kinds = [named_degree(group) for group in one.groups]
    if not any(kinds):
        return names_of(store, candidates, groups, hints, one.path)
    whole = Names([[] for _ in groups], {}, [])
    for kind in dict.fromkeys(kinds):
        chosen = [g for g, own in enumerate(kinds) if own == kind]
        some = Candidates({n: leaf for n, leaf in candidates.leaves.items() if degrees.get(n) == kind})
        found = names_of(store, some, [groups[g] for g in chosen], [hints[g] for g in chosen], one.path)
        for g, names in zip(chosen, found.certain, strict=True):
            whole.certain[g] = names
        whole.open.update(found.open)
        whole.notes.extend(note for note in found.notes if note not in whole.notes)
    return whole


def _carry(found: Found, where: dict[str, Tree], master: Tree, states: Mapping[str, Tree]) -> None:
    """Keep the states of parameters whose names are not known as they are."""
    held = {"master": master, "states": dict(states)} if master is not None else {"states": dict(states)}
    found.rest[0].setdefault("unnamed", []).append({**where, **held})


def _leave_open(found: Found, undecided: Mapping[str, str], candidates: Candidates) -> None:
    """Parameters that may be the unnamed ones: their values are the module's own."""
    found.undecided.update(undecided)
    for name in undecided:
        found.shapes[name] = candidates.leaves[name].extent.shape
        found.add(name, "value", _whole(candidates.leaves[name]))


def _members(one: Saved) -> list[list[Member]]:
    groups = []
    for g in range(len(one.groups)):
        numbers = one.numbers(g)
        masters: Sequence[Tree] = [None] * len(numbers)
        where = f"{one.path}: group {g}"
        if one.masters is not None:
            masters = [nodes.tensor(m, where) for m in nodes.sequence(one.masters[g], where)]
        if len(masters) != len(numbers):
            raise CorruptError(f"{where}: {len(masters)} masters for {len(numbers)} parameters")
        groups.append([Member(one.state(n), master) for n, master in zip(numbers, masters, strict=True)])
    return groups


def _place_member(found: Found, name: str, member: Member, leaf: TensorLeaf, comparison: Comparison) -> None:
    """All states of one parameter; its value is the master, or the module's own tensor where there is none."""
    found.shapes[name] = leaf.extent.shape
    found.add(name, "value", _whole(member.master or leaf))
    left: dict[str, Tree] = {}
    for key, node in member.state.items():
        scalar = scalar_of(node, comparison)
        if scalar is not None:
            found.scalars.setdefault(name, {})[str(key)] = scalar
        elif nodes.is_tensor(node) and key != "value":
            found.add(name, str(key), _whole(node))
        else:
            left[str(key)] = node
    if left:
        found.rest[0].setdefault("state", {})[name] = left


def _read_flat(store: Store, one: Saved, comparison: Comparison, candidates: Candidates) -> Found:
    assert one.masters is not None
    found = Found(rest={0: dict(one.rest)})
    masters = [nodes.tensor(master, f"{one.path}: fp32_groups_flat") for master in one.masters]
    named = flat_names(store, candidates, masters)
    for g, names in enumerate(named):
        numbers = one.numbers(g)
        states = one.state(numbers[0]) if numbers else {}
        if names is None:
            _carry(found, {"group": g}, masters[g], states)
        else:
            _place_flat(found, one, g, {name: candidates.leaves[name].extent.shape for name in names}, comparison)
        found.groups.append(ParamGroup(tuple(names or ()), _options(one.groups[g])))
    if None in named:
        left = [name for name in candidates.leaves if name not in found.shapes]
        why = f"the module does not show which of them lie in flat group {named.index(None)}"
        undecided_names, notes = undecided(left, one.path, why)
        found.notes += notes
        _leave_open(found, undecided_names, candidates)
    return found


def _place_flat(found: Found, one: Saved, g: int, shapes: dict[str, Shape], comparison: Comparison) -> None:
    """All states of a group whose parameters lie back to back in flat tensors."""
    assert one.masters is not None
    where = f"{one.path}: group {g}"
    layout = flat_group(shapes, paddings=None, lengths=[one.masters[g].extent.size], ends=[0], where=where)
    found.shapes.update(shapes)
    place(found, layout, "value", [one.masters[g]], where)
    numbers = one.numbers(g)
    left = place_group(found, layout, [one.state(numbers[0]) if numbers else {}], comparison, where)[0]
    if left:
        found.rest[0].setdefault("state", {})[g] = left


def _options(group: Mapping[str, Tree]) -> dict[str, Tree]:
    return {str(key): value for key, value in group.items() if key not in _BESIDE_OPTIONS}


def _whole(leaf: TensorLeaf) -> Stored:
    shape = leaf.extent.shape
    return Stored(TensorSpec(shape, leaf.extent.dtype), (Fragment(Box.whole(shape), leaf.extent),))
