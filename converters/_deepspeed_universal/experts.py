"""Experts of native mixture-of-experts layers in a universal folder.

A job calls its experts by local numbers, so that all its ranks would load the experts of rank 0. Its loader can cut:
of a file that says ``is_expert_param`` it takes entries ``[rank * n / ep, (rank + 1) * n / ep)`` along dim 0, n being
``ep_num_experts`` and ep the largest expert-parallel degree of the job (deepspeed/checkpoint/universal_checkpoint.py,
``load_hp_checkpoint_state``, made for AutoEP). So the folder has, under each local name, the experts that the job's
expert-parallel ranks call so, stacked: one each. A job of another degree than that fails on loading: the number of
entries is no multiple of its degree, or more than one entry is left.

The experts of AutoEP's layers are stacked anyhow, all of a layer in one tensor, of which a job of any degree takes its
own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ucp.catalog import Catalog, ParamGroup, Tensor
from ucp.errors import CorruptError, FitError
from ucp.layout import Box, FlatRange, Shape
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.training import first_rank

from .._deepspeed.autoep import auto_layers
from .._deepspeed.experts import EXPERT, named_degree
from .._deepspeed.load import RankFile

IS_EXPERT, COUNT = "is_expert_param", "ep_num_experts"
GROUP_NAMES = "source_group_names"
"""Entry of ``zero/optimizer_state.pt`` that only we read: what groups were called for the source's degree."""

_Held = tuple[TensorSpec, tuple[Fragment, ...]]


def stacked(catalog: Catalog, ep: int) -> tuple[Catalog, dict[str, int]]:
    """`catalog` with the trained experts under local names, `ep` stacked in each, and these names with their `ep`.

    FitError for experts whose number `ep` does not divide, or of which some are trained and others not.
    """
    plan = dict(_stacks(catalog, ep))
    owner = {name: local for local, names in plan.items() for name in names}
    fragments = {key: held for key, held in catalog.fragments.items() if key.name not in owner}
    tensors: dict[str, Tensor] = {}
    witnesses = {name: held for name, held in catalog.witnesses.items() if name not in owner}
    for name, tensor in catalog.tensors.items():
        local = owner.get(name)
        if local is None:
            tensors[name] = tensor
        elif local not in tensors:
            tensors[local] = _stack(catalog, local, plan[local], fragments)
            held = [catalog.witnesses.get(one) for one in plan[local]]
            if None not in held:
                witnesses[local] = _join([one for one in held if one is not None])
    groups = tuple(_group(catalog, group, owner, ep) for group in catalog.param_groups)
    ties = dict(_local_tie(alias, name, owner) for alias, name in catalog.ties.items())
    made = replace(catalog, tensors=tensors, fragments=fragments, witnesses=witnesses, param_groups=groups, ties=ties)
    return made, {local: len(names) for local, names in plan.items()}


def _local_tie(alias: str, name: str, owner: Mapping[str, str]) -> tuple[str, str]:
    """A tie under local names: two layers that share experts number them alike."""
    match, local = EXPERT.fullmatch(alias), EXPERT.fullmatch(owner.get(name, ""))
    return (f"{match[1]}{local[2]}{match[3]}", owner[name]) if match and local else (alias, name)


def _group(catalog: Catalog, group: ParamGroup, owner: Mapping[str, str], ep: int) -> ParamGroup:
    """A group under the job's names; a group of experts is called after their degree (deepspeed/moe/layer.py)."""
    names = tuple(dict.fromkeys(owner.get(name, name) for name in map(catalog.resolve, group.params)))
    named = named_degree(group.options) is not None
    options = {**group.options, "name": f"ep_size_{ep}"} if named else group.options
    return ParamGroup(names, options)


def _stacks(catalog: Catalog, ep: int) -> Iterator[tuple[str, list[str]]]:
    """Each local name with the names of the experts that ranks call so, in order of ranks."""
    numbers: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in catalog.tensors.items():
        if match := EXPERT.fullmatch(name):
            numbers[match[1], match[3]][int(match[2])] = tensor
    for (prefix, suffix), found in numbers.items():
        kinds = {tensor.kind for tensor in found.values()}
        if "parameter" not in kinds:
            continue
        total = max(found) + 1
        if len(found) != total or len(kinds) > 1:
            raise FitError(f"{prefix}*{suffix}: trained in some experts alone, which a universal folder cannot hold")
        if total % ep:
            raise FitError(
                f"{prefix}*{suffix}: {total} experts cannot be spread over {ep} expert-parallel ranks",
                hint="give another ep (on the command line: -t ep=…), the degree of the job that resumes",
            )
        local = total // ep
        for number in range(local):
            yield f"{prefix}{number}{suffix}", [f"{prefix}{e * local + number}{suffix}" for e in range(ep)]


def _stack(catalog: Catalog, local: str, names: list[str], fragments: dict[Key, tuple[Fragment, ...]]) -> Tensor:
    """One tensor of several experts; its fragments go into `fragments`."""
    first, *others = (catalog.tensors[name] for name in names)
    for other in others:
        if (other.states, other.scalars) != (first.states, first.scalars):
            raise FitError(f"{first.name} and {other.name} have other states, shapes or steps")
    specs = {}
    for state, spec in first.states.items():
        if any(Key(name, state) in held for held in (catalog.views, catalog.reductions) for name in names):
            raise FitError(f"{first.name}: experts that a program put together have no place in a universal folder")
        held = _join([(spec, catalog.fragments[Key(name, state)]) for name in names])
        specs[state], fragments[Key(local, state)] = held
    return replace(first, name=local, states=specs, dims=None)


def _join(held: list[_Held]) -> _Held:
    spec = held[0][0]
    found = [_moved(fragment, index, spec.shape) for index, (_, own) in enumerate(held) for fragment in own]
    return replace(spec, shape=(len(held), *spec.shape)), tuple(found)


def _moved(fragment: Fragment, index: int, shape: Shape) -> Fragment:
    """A fragment of a tensor of `shape` as one of entry `index` of a stack."""
    region, extent = fragment.region, fragment.extent
    if isinstance(region, FlatRange):
        return replace(fragment, region=FlatRange(index * math.prod(shape) + region.start, region.length))
    inner = replace(extent, shape=(1, *extent.shape), strides=(extent.size, *extent.strides))
    return replace(fragment, region=Box((index, *region.start), (1, *region.shape)), extent=inner)


def of_autoep(catalog: Catalog) -> dict[str, int]:
    """The stacked parameters of AutoEP's layers, which are in a folder as they are, and the number of their experts."""
    layers = auto_layers(RankFile(catalog.url, first_rank(catalog)))
    return {name: layer.experts for layer in layers for name in layer.names if name in catalog.tensors}


def unstacked(catalog: Catalog, stacks: Mapping[str, int]) -> Catalog:
    """The inverse of `stacked`; `stacks` are local names with the number of experts in each.

    CorruptError where a file holds another number of them than it says.
    """
    local: dict[str, int] = defaultdict(int)
    for name in stacks:
        match = EXPERT.fullmatch(name)
        assert match is not None
        local[match[1]] = max(local[match[1]], int(match[2]) + 1)
    tensors: dict[str, Tensor] = {}
    fragments = {key: held for key, held in catalog.fragments.items() if key.name not in stacks}
    names: dict[str, list[str]] = {}
    for name, tensor in catalog.tensors.items():
        if name not in stacks:
            tensors[name] = tensor
            continue
        names[name] = []
        for index in range(stacks[name]):
            one = _unstack(catalog, tensor, index, stacks[name], local, fragments)
            tensors[one.name] = one
            names[name].append(one.name)
    groups = tuple(
        replace(group, params=tuple(one for name in group.params for one in names.get(name, [name])))
        for group in catalog.param_groups
    )
    ties = dict(tie for alias, name in catalog.ties.items() for tie in _global_ties(alias, name, stacks, local))
    return replace(catalog, tensors=tensors, fragments=fragments, param_groups=groups, ties=ties)


def _global_ties(
    alias: str, name: str, stacks: Mapping[str, int], local: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    one, other = EXPERT.fullmatch(alias), EXPERT.fullmatch(name)
    if one is None or other is None or name not in stacks:
        yield alias, name
        return
    for index in range(stacks[name]):
        number = index * local[other[1]] + int(other[2])
        yield f"{one[1]}{number}{one[3]}", f"{other[1]}{number}{other[3]}"


def _unstack(
    catalog: Catalog,
    tensor: Tensor,
    index: int,
    count: int,
    local: Mapping[str, int],
    fragments: dict[Key, tuple[Fragment, ...]],
) -> Tensor:
    match = EXPERT.fullmatch(tensor.name)
    assert match is not None
    name = f"{match[1]}{index * local[match[1]] + int(match[2])}{match[3]}"
    specs = {}
    for state, spec in tensor.states.items():
        if spec.shape[:1] != (count,):
            raise CorruptError(f"{catalog.url}: {tensor.name} is of shape {list(spec.shape)}, not of {count} experts")
        specs[state] = replace(spec, shape=spec.shape[1:])
        (whole,) = catalog.fragments[Key(tensor.name, state)]
        fragments[Key(name, state)] = (_entry(whole, index, specs[state]),)
    return replace(tensor, name=name, states=specs)


def _entry(whole: Fragment, index: int, spec: TensorSpec) -> Fragment:
    """Entry `index` of a stack that lies in one piece."""
    extent = whole.extent
    if isinstance(whole.region, FlatRange):
        return Fragment(FlatRange(0, spec.size), extent.sub(Box((index * spec.size,), (spec.size,))))
    inner = extent.sub(Box((index, *(0 for _ in spec.shape)), (1, *spec.shape)))
    own = Extent(inner.object, inner.offset, spec.shape, inner.strides[1:], inner.dtype)
    return Fragment(Box.whole(spec.shape), own)
