"""Reads the optimizer files of ZeRO 1, 2 and 3 and of BF16_Optimizer.

Keys: ``state_dict`` of deepspeed/runtime/zero/stage_1_and_2.py, of deepspeed/runtime/bf16_optimizer.py and
``_rigid_state_dict`` of deepspeed/runtime/zero/stage3.py. The order of parameters in the flat data is that of
``param_shapes`` (deepspeed/runtime/engine.py, ``_get_zero_param_shapes``), under ``round_robin_gradients`` too;
``param_slice_mappings`` is built from another list there and is only compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.catalog import ParamGroup
from ucp.errors import ConflictError, CorruptError, FitError
from ucp.layout import Shape
from ucp.tree import Tree

from . import nodes
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
        "zero_stage",
    }
)


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
    layouts = _layouts(save, mp, shapes, masters, inner)
    for index, layout in enumerate(layouts):
        where = f"{files[0].path}: group {index}"
        found.shapes.update(layout.shapes)
        place(found, layout, "value", [master[index] for master in masters], where)
    left = _place_states(found, layouts, files, inner, comparison)
    found.groups = _groups(files[0], inner[0], layouts)
    if save.stage != 3:
        found.notes += check_slices(
            [g for g in layouts if isinstance(g, FlatGroup)], inner, files, _round_robin(save, mp)
        )
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


def _layouts(
    save: Save,
    mp: int,
    shapes: Sequence[Mapping[str, Shape]],
    masters: Sequence[Sequence[Tree]],
    inner: Sequence[Mapping[str, Tree]],
) -> list[Layout]:
    path = save.ranks(mp)[0].path
    for rank, master in enumerate(masters):
        if len(master) != len(shapes):
            raise CorruptError(f"{save.ranks(mp)[rank].path}: {len(master)} groups, but {path} holds {len(shapes)}")
    layouts: list[Layout] = []
    for index, group in enumerate(shapes):
        where = f"{path}: group {index}"
        lengths = [nodes.tensor(master[index], where).extent.size for master in masters]
        if save.stage == 3:
            layouts.append(partitioned_group(group, lengths=lengths, where=where))
            continue
        gaps = _of_group(inner[0], "param_alignment_paddings", index, where)
        ends = [_of_group(tree, "group_paddings", index, where) for tree in inner]
        paddings = None if gaps is None else [nodes.integer(n, where) for n in nodes.sequence(gaps, where)]
        whole = None if None in ends else [nodes.integer(n, where) for n in ends]
        layouts.append(flat_group(group, paddings=paddings, lengths=lengths, ends=whole, where=where))
    return layouts


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


def _place_states(
    found: Found,
    layouts: Sequence[Layout],
    files: Sequence[RankFile],
    inner: Sequence[Mapping[str, Tree]],
    comparison: Comparison,
) -> list[dict[int, dict[str, Tree]]]:
    """Place all groups' states; what is left of them by rank and group."""
    left: list[dict[int, dict[str, Tree]]] = [{} for _ in files]
    per_rank = [_states(file, tree, len(layouts)) for file, tree in zip(files, inner, strict=True)]
    for index, layout in enumerate(layouts):
        where = f"{files[0].path}: group {index}"
        states = [groups[index] for groups in per_rank]
        for rank, rest in enumerate(place_group(found, layout, states, comparison, where)):
            if rest:
                left[rank][index] = rest
    if any(left):
        names = sorted({str(key) for groups in left for rest in groups.values() for key in rest})
        found.notes.append(
            f"optimizer state {', '.join(names)} is of flat partitions and not of parameters; it is carried as it is"
        )
    return left


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


def _groups(file: RankFile, tree: Mapping[str, Tree], layouts: Sequence[Layout]) -> list[ParamGroup]:
    """Parameter groups by name. A group's ``params`` are numbers of flat groups: one, or all its sub-groups."""
    base = _base(tree)
    if not isinstance(base, Mapping):
        return [ParamGroup(tuple(layout.shapes), {}) for layout in layouts]
    where = f"{file.path}: param_groups"
    groups = []
    for group in nodes.sequence(base.get("param_groups", ()), where):
        options = dict(nodes.mapping(group, where))
        indices = [nodes.integer(i, where) for i in nodes.sequence(options.pop("params", ()), where)]
        if any(i not in range(len(layouts)) for i in indices):
            raise CorruptError(f"{where}: refers to groups {indices}, but there are {len(layouts)}")
        groups.append(ParamGroup(tuple(name for i in indices for name in layouts[i].shapes), options))
    if sorted(n for g in groups for n in g.params) != sorted(n for layout in layouts for n in layout.shapes):
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
