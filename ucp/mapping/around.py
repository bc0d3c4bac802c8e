"""What lies around the tensors of several coordinates, merged: step, groups, training state, checksums, objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ucp.catalog import Catalog, Checksum, ParamGroup
from ucp.errors import ConflictError
from ucp.format.manifest import FAMILY, keeps
from ucp.layout import Mesh
from ucp.tree import Tree

Part = tuple[Mapping[str, int], Catalog]
"""A coordinate of the mesh, and what is held there; axes left out are not distinguished."""

Targets = Mapping[tuple[int, str], Sequence[str]]
"""(number of a part, name of a tensor in it) -> names of the logical tensors that it became."""


def told(coordinate: Mapping[str, int]) -> str:
    """``@tp=0,pp=1``; nothing for no axes."""
    return "@" + ",".join(f"{axis}={index}" for axis, index in coordinate.items()) if coordinate else ""


def step(parts: Sequence[Part]) -> int | None:
    """The step of all parts that know it; ConflictError if they differ."""
    found = {catalog.step: told(coordinate) for coordinate, catalog in parts if catalog.step is not None}
    if len(found) > 1:
        each = " and ".join(f"{number} at {where.removeprefix('@')}" for number, where in found.items())
        raise ConflictError(f"{parts[0][1].url}: coordinates were saved at different steps: {each}")
    return next(iter(found), None)


def notes(parts: Sequence[Part]) -> tuple[str, ...]:
    """The remarks of all parts, each once."""
    return tuple(dict.fromkeys(note for _, catalog in parts for note in catalog.notes))


def objects(parts: Sequence[Part]) -> dict[str, tuple[int, str]]:
    """Every object used; ConflictError for one that changed between two parts."""
    found: dict[str, tuple[int, str]] = {}
    for _, catalog in parts:
        for path, entry in catalog.objects.items():
            if found.setdefault(path, entry) != entry:
                raise ConflictError(f"{catalog.url}/{path}: changed while it was read")
    return found


def checksums(parts: Sequence[Part]) -> Sequence[Checksum]:
    """The checksums of all parts, each once."""
    if len(parts) == 1:
        return parts[0][1].checksums
    return tuple(dict.fromkeys(checksum for _, catalog in parts for checksum in catalog.checksums))


def options(parts: Sequence[Part]) -> dict[str, object]:
    """What a rewrite must keep, where there is one part: not what was kept for tensors under other names."""
    if len(parts) != 1:
        return {}
    catalog = parts[0][1]
    kept = dict(catalog.options)
    if FAMILY in kept:
        kept[FAMILY] = replace(keeps(catalog), tensors={})
    return kept


def state(parts: Sequence[Part], mesh: Mesh) -> dict[str, Tree]:
    """Training state: what all parts say alike once, what they do not under ``name@axis=index,...`` each."""
    found: dict[str, Tree] = {}
    order = [axis for axis, _ in mesh.axes]
    for name in dict.fromkeys(name for _, catalog in parts for name in catalog.state):
        held = [(coordinate, catalog.state[name]) for coordinate, catalog in parts if name in catalog.state]
        if len(held) == len(parts) and all(same(held[0][1], tree) for _, tree in held[1:]):
            found[name] = held[0][1]
            continue
        for coordinate, tree in held:
            known = sorted(coordinate, key=lambda axis: order.index(axis) if axis in order else len(order))
            key = name + told({axis: coordinate[axis] for axis in known})
            if key in found and not same(found[key], tree):
                raise ConflictError(f"{name}: two parts at {key.removeprefix(name)[1:]} say different things of it")
            found[key] = tree
    return found


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees are equal, types counted; tensors where their bytes lie at the same place or are inline."""
    stack = [(a, b)]
    while stack:
        one, two = stack.pop()
        if type(one) is not type(two):
            return False
        if isinstance(one, dict):
            if one.keys() != two.keys():
                return False
            stack.extend((one[key], two[key]) for key in one)
        elif isinstance(one, list | tuple):
            if len(one) != len(two):
                return False
            stack.extend(zip(one, two, strict=True))
        elif one is not two and one != two and not (one != one and two != two):
            return False
    return True


@dataclass(slots=True)
class _Group:
    """A group being merged: `parts` that have joined it already."""

    options: Mapping[str, Any]
    params: dict[str, None] = field(default_factory=dict)
    parts: set[int] = field(default_factory=set)


def param_groups(parts: Sequence[Part], targets: Targets) -> tuple[ParamGroup, ...]:
    """The groups of all parts by logical names. Groups of different parts with the same options are one.

    ConflictError for a tensor that different coordinates keep in groups with different options.
    """
    merged: list[_Group] = []
    for number, (_, catalog) in enumerate(parts):
        for group in catalog.param_groups:
            held = (targets.get((number, catalog.ties.get(name, name)), ()) for name in group.params)
            names = dict.fromkeys(name for found in held for name in found)
            home = _home(merged, group, names, number)
            home.parts.add(number)
            home.params.update(names)
    homes: dict[str, _Group] = {}
    for one in merged:
        for name in list(one.params):
            first = homes.setdefault(name, one)
            if not same(dict(first.options), dict(one.options)):
                raise ConflictError(
                    f"{name}: is in groups of the optimizer with different hyper-parameters",
                    hint="its parts were trained differently: give each a rule, and a logical tensor, of its own",
                )
            if first is not one:
                del one.params[name]
    return tuple(ParamGroup(tuple(one.params), one.options) for one in merged)


def _home(merged: list[_Group], group: ParamGroup, names: Mapping[str, None], part: int) -> _Group:
    """The group with the same options that shares parameters, else one that `part` has not joined, else a new one."""
    alike = [known for known in merged if part not in known.parts and same(dict(known.options), dict(group.options))]
    alike.sort(key=lambda known: known.params.keys().isdisjoint(names))
    if not alike:
        merged.append(_Group(group.options))
    return alike[0] if alike else merged[-1]
