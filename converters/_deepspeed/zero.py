"""Reads the optimizer files of ZeRO 1, 2 and 3 and of BF16_Optimizer.

Keys: ``state_dict`` of deepspeed/runtime/zero/stage_1_and_2.py, of deepspeed/runtime/bf16_optimizer.py and
``_rigid_state_dict`` of deepspeed/runtime/zero/stage3.py. The order of parameters in the flat data is that of
``param_shapes`` (deepspeed/runtime/engine.py, ``_get_zero_param_shapes``), under ``round_robin_gradients`` too;
``param_slice_mappings`` is built from another list there and is only compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp.catalog import ParamGroup
from ucp.errors import ConflictError, CorruptError, FitError
from ucp.layout import Shape
from ucp.tree import Tree

from . import nodes
from .experts import check_ranks, degree_of, experts_of
from .flat import FlatGroup, flat_group, partitioned_group
from .found import Found, Layout, place, place_group
from .load import MIXED_HINT, RankFile, Save
from .same import Comparison, plain_equal
from .slices import check_slices, shapes_of_slices

# What the layout itself says; everything else in an optimizer file is carried.
_CONSUMED = frozenset(
    {
        "base_optimizer_state",
        "optimizer_state_dict",
        "single_partition_of_fp32_groups",
        "fp32_flat_groups",
        "group_paddings",
        "param_alignment_paddings",
        "partition_count",
        "param_slice_mappings",
        "ds_zero_partition_groups",
        "zero_stage",
    }
)


@dataclass(frozen=True, slots=True)
class Lane:
    """Ranks that partition parameters among them: `layout` has those by the ranks' own names, `names` the whole's.

    It is `number` of `count` of its group.
    """

    ranks: tuple[int, ...]
    layout: Layout
    names: Mapping[str, str]
    number: int = 0
    count: int = 1


def read_optimizer(save: Save, mp: int, comparison: Comparison, module: Mapping[str, Shape]) -> Found:
    """The optimizer states of model-parallel rank `mp`.

    `module` gives shapes for the one optimizer that is saved without ``param_shapes``. CorruptError if sizes
    contradict shapes, FitError for a structure that is not one of DeepSpeed's.
    """
    files = save.ranks(mp)
    inner = [_inner(file) for file in files]
    key = "fp32_flat_groups" if save.stage == 3 else "single_partition_of_fp32_groups"
    masters = [_masters(file, tree, key) for file, tree in zip(files, inner, strict=True)]
    shapes = _shapes(save.model(mp), module, files, len(masters[0]))
    _check_second_copy(save.model(mp), files[0], inner[0], comparison)
    found = Found()
    groups = _lanes(save, mp, shapes, masters, inner)
    experts = experts_of(save)
    found.degrees = {len(lanes) for lanes in groups if any(map(experts.own, lanes[0].names))}
    left = _place_all(found, groups, masters, files, inner, comparison, experts.stacked)
    found.groups = _groups(files[0], inner[0], groups)
    if save.stage != 3:
        found.notes += check_slices(_partitions(groups, len(files)), inner, files, _round_robin(save, mp))
    for rank, (file, tree) in enumerate(zip(files, inner, strict=True)):
        found.rest[rank] = _rest(file, tree, left[rank], save.model(mp).root)
    if isinstance(_base(inner[0]), list):
        found.notes.append("elastic_checkpoint saves no hyper-parameters: the optimizer's groups have none here")
    return found


def _check_second_copy(model: RankFile, file: RankFile, tree: Mapping[str, Tree], comparison: Comparison) -> None:
    """BF16_Optimizer without ZeRO is saved in the model file as well, by the same rank at the same moment."""
    copy = model.root.get("optimizer")
    if copy is not None and not comparison.equal(copy, tree):
        raise ConflictError(f"{model.path} and {file.path} hold different optimizers", hint=MIXED_HINT)


def _inner(file: RankFile) -> Mapping[str, Tree]:
    return nodes.mapping(file.root.get("optimizer_state_dict"), f"{file.path}: optimizer_state_dict")


def _masters(file: RankFile, tree: Mapping[str, Tree], key: str) -> list[Tree] | tuple[Tree, ...]:
    if key not in tree:
        raise FitError(
            f"{file.path}: an optimizer with {', '.join(map(str, tree))} is not one of DeepSpeed's that can be read",
            hint=f"there is no {key}; versions since 0.5 and ZeRO stages 0 to 3 are known",
        )
    return [nodes.tensor(master, f"{file.path}: {key}") for master in nodes.sequence(tree[key], f"{file.path}: {key}")]


def _shapes(
    model: RankFile, module: Mapping[str, Shape], files: Sequence[RankFile], count: int
) -> list[dict[str, Shape]]:
    """Shapes by name of every flat group, in flat order."""
    saved = model.root.get("param_shapes")
    where = f"{model.path}: param_shapes"
    if saved is None:
        return shapes_of_slices(files, module)
    # Versions before 0.5 saved one dict for all groups.
    listed = [saved] if isinstance(saved, Mapping) else nodes.sequence(saved, where)
    shapes = [{str(k): nodes.shape(v, f"{where} {k}") for k, v in nodes.mapping(g, where).items()} for g in listed]
    if len(shapes) != count:
        raise CorruptError(
            f"{where}: {len(shapes)} groups, but {files[0].path} holds {count}",
            hint=MIXED_HINT,
        )
    names = [name for group in shapes for name in group]
    if len(set(names)) != len(names):
        raise CorruptError(f"{where}: names a parameter twice")
    return shapes


def _lanes(
    save: Save,
    mp: int,
    shapes: Sequence[Mapping[str, Shape]],
    masters: Sequence[Sequence[Tree]],
    inner: Sequence[Mapping[str, Tree]],
) -> list[list[Lane]]:
    """Each flat group by the ranks that partition it: one lane, or for experts one per expert-parallel rank."""
    files = save.ranks(mp)
    path = files[0].path
    for rank, master in enumerate(masters):
        if len(master) != len(shapes):
            raise CorruptError(f"{files[rank].path}: {len(master)} groups, but {path} holds {len(shapes)}")
    experts, options = experts_of(save), _options_of_flat(files[0], inner[0], len(shapes))
    groups: list[list[Lane]] = []
    for index, group in enumerate(shapes):
        where = f"{path}: group {index}"
        ep = degree_of(inner[0], index, options[index], group, experts, save.dp, where)
        lanes = []
        for e, ranks in enumerate(experts.lanes(save.dp, ep)):
            for rank in ranks:
                check_ranks(inner[rank], index, ranks, f"{files[rank].path}: group {index}")
            held = [(masters[rank][index], inner[rank]) for rank in ranks]
            layout = _layout(group, held, index, save.stage, f"{files[ranks[0]].path}: group {index}")
            lanes.append(Lane(ranks, layout, experts.names(group, e, ep, where), e, ep))
        groups.append(lanes)
    return groups


def _layout(
    group: Mapping[str, Shape], held: Sequence[tuple[Tree, Mapping[str, Tree]]], index: int, stage: int, where: str
) -> Layout:
    """How a group's parameters lie in the partitions of some ranks, each given with what is beside it."""
    lengths = [nodes.tensor(master, where).extent.size for master, _ in held]
    if stage == 3:
        return partitioned_group(group, lengths=lengths, where=where)
    gaps = _of_group(held[0][1], "param_alignment_paddings", index, where)
    ends = [_of_group(tree, "group_paddings", index, where) for _, tree in held]
    paddings = None if gaps is None else [nodes.integer(n, where) for n in nodes.sequence(gaps, where)]
    whole = None if None in ends else [nodes.integer(n, where) for n in ends]
    return flat_group(group, paddings=paddings, lengths=lengths, ends=whole, where=where)


def _options_of_flat(file: RankFile, tree: Mapping[str, Tree], count: int) -> list[Mapping[str, Tree]]:
    """Of each flat group, the parameter group that it is of; empty where these are not saved."""
    base = _base(tree)
    found: list[Mapping[str, Tree]] = [{} for _ in range(count)]
    for group in nodes.sequence(base.get("param_groups", ()), file.path) if isinstance(base, Mapping) else ():
        options = nodes.mapping(group, file.path)
        for index in nodes.sequence(options.get("params", ()), file.path):
            if isinstance(index, int) and index in range(count):
                found[index] = options
    return found


def _partitions(groups: Sequence[Sequence[Lane]], dp: int) -> list[list[tuple[FlatGroup, int]]]:
    """For each rank the layouts of all groups, and which partition of each it holds."""
    at = [{rank: (lane.layout, n) for lane in lanes for n, rank in enumerate(lane.ranks)} for lanes in groups]
    return [[(g, n) for g, n in (held[rank] for held in at) if isinstance(g, FlatGroup)] for rank in range(dp)]


def _of_group(tree: Mapping[str, Tree], key: str, index: int, where: str) -> Tree:
    listed = tree.get(key)
    if listed is None:
        return None
    listed = nodes.sequence(listed, f"{where}: {key}")
    if index >= len(listed):
        raise CorruptError(f"{where}: {key} has {len(listed)} entries")
    return listed[index]


def _base(tree: Mapping[str, Tree]) -> Tree:
    return tree.get("base_optimizer_state", tree.get("optimizer_state_dict"))


def _place_all(
    found: Found,
    groups: Sequence[Sequence[Lane]],
    masters: Sequence[Sequence[Tree]],
    files: Sequence[RankFile],
    inner: Sequence[Mapping[str, Tree]],
    comparison: Comparison,
    stacked: Mapping[str, int],
) -> list[dict[int, dict[str, Tree]]]:
    """Place all groups' masters and states; what is left of them by rank and group."""
    left: list[dict[int, dict[str, Tree]]] = [{} for _ in files]
    per_rank = [_states(file, tree, len(groups)) for file, tree in zip(files, inner, strict=True)]
    for index, lanes in enumerate(groups):
        for lane in lanes:
            where = f"{files[lane.ranks[0]].path}: group {index}"
            held = Found(shapes=dict(lane.layout.shapes))
            place(held, lane.layout, "value", [masters[rank][index] for rank in lane.ranks], where)
            states = [per_rank[rank][index] for rank in lane.ranks]
            for rank, rest in zip(lane.ranks, place_group(held, lane.layout, states, comparison, where), strict=True):
                if rest:
                    left[rank][index] = rest
            _adopt(found, held, lane, stacked)
        _check_steps(found, lanes, f"{files[0].path}: group {index}")
    if any(left):
        names = sorted({str(key) for groups_left in left for rest in groups_left.values() for key in rest})
        found.notes.append(
            f"optimizer state {', '.join(names)} is of flat partitions and not of parameters; it is carried as it is"
        )
    return left


def _adopt(found: Found, held: Found, lane: Lane, stacked: Mapping[str, int]) -> None:
    """Take over what a lane holds; of a stacked parameter, which is first of its group's lanes or follows them."""
    for name in [name for name in held.shapes if name in stacked]:
        if held.shapes[name][:1] != (stacked[name] // lane.count,):
            raise CorruptError(
                f"{name}: has shape {list(held.shapes[name])} on each of {lane.count} ranks, and {stacked[name]} "
                "experts in all",
                hint=MIXED_HINT,
            )
        found.adopt_stacked(held, name, lane.number, lane.count)
        del held.shapes[name]
    found.adopt(held, lane.names)


def _check_steps(found: Found, lanes: Sequence[Lane], where: str) -> None:
    """ConflictError if experts of one group stand at different steps."""
    first = [found.scalars.get(name, {}).get("step") for lane in lanes for name in list(lane.names.values())[:1]]
    if any(step != first[0] for step in first):
        steps = " and ".join(sorted({str(step.value if step else None) for step in first}))
        raise ConflictError(f"{where}: experts of different ranks stand at different steps ({steps})", hint=MIXED_HINT)


def _states(file: RankFile, tree: Mapping[str, Tree], count: int) -> list[Mapping[str, Tree]]:
    """The states of each flat group; with ``elastic_checkpoint`` a list, else keyed by the optimizer's numbering."""
    base = _base(tree)
    where = f"{file.path}: optimizer state"
    if isinstance(base, list | tuple):
        states = [nodes.mapping(group, where) for group in base]
        if len(states) != count:
            raise CorruptError(f"{where}: {len(states)} groups where there are {count}")
        return states
    base = nodes.mapping(base, where)
    numbered = nodes.mapping(base.get("state", {}), where)
    unknown = [key for key in numbered if key not in range(count)]
    if unknown:
        raise CorruptError(f"{where}: states of {unknown}, but there are {count} flat groups")
    return [nodes.mapping(numbered.get(index, {}), where) for index in range(count)]


def _groups(file: RankFile, tree: Mapping[str, Tree], flat: Sequence[Sequence[Lane]]) -> list[ParamGroup]:
    """Parameter groups by name. A group's ``params`` are numbers of flat groups: one, or all its sub-groups."""
    base = _base(tree)
    named = [tuple(dict.fromkeys(name for lane in lanes for name in lane.names.values())) for lanes in flat]
    if not isinstance(base, Mapping):
        return [ParamGroup(names, {}) for names in named]
    where = f"{file.path}: param_groups"
    groups = []
    for group in nodes.sequence(base.get("param_groups", ()), where):
        options = dict(nodes.mapping(group, where))
        indices = [nodes.integer(i, where) for i in nodes.sequence(options.pop("params", ()), where)]
        if any(i not in range(len(named)) for i in indices):
            raise CorruptError(f"{where}: refers to groups {indices}, but there are {len(named)}")
        groups.append(ParamGroup(tuple(name for i in indices for name in named[i]), options))
    if sorted(n for g in groups for n in g.params) != sorted(n for names in named for n in names):
        raise CorruptError(f"{where}: the groups do not hold every parameter once")
    return groups


def _round_robin(save: Save, mp: int) -> bool:
    config = save.model(mp).root.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return bool(zero.get("round_robin_gradients")) if isinstance(zero, Mapping) else False


def _rest(
    file: RankFile, tree: Mapping[str, Tree], left: Mapping[int, Mapping[str, Tree]], model: Mapping[str, Tree]
) -> dict[str, Tree]:
    """Everything of a rank's file that has no place and is not in the model file: the wrapper's entries, and others."""
    rest = {str(key): value for key, value in tree.items() if key not in _CONSUMED}
    base = _base(tree)
    extra = {k: v for k, v in base.items() if k not in ("state", "param_groups")} if isinstance(base, Mapping) else {}
    if extra:
        rest["base_optimizer"] = extra
    if left:
        rest["state"] = {index: dict(states) for index, states in left.items()}
    told = {key for key in ("ds_config", "ds_version") if plain_equal(file.root.get(key), model.get(key))}
    beside = {k: v for k, v in file.root.items() if k != "optimizer_state_dict" and k not in told}
    if beside:
        rest["file"] = beside
    return rest
