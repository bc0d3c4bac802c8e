"""``param_slice_mappings``: where a rank says that each parameter lies in its partition.

deepspeed/runtime/zero/stage_1_and_2.py builds it in ``_create_param_mapping`` from the groups' plain order, while the
data is in round-robin order where ``round_robin_gradients`` is on: the mapping is wrong there, and ``param_shapes`` is
right. It is compared, and used for names only where a file has no ``param_shapes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp.errors import CorruptError, FitError
from ucp.layout import Shape, numel
from ucp.tree import Tree

from . import nodes
from .flat import FlatGroup
from .load import MIXED_HINT, RankFile

_ROUND_ROBIN = (
    "round_robin_gradients: param_slice_mappings is wrong in this checkpoint, as DeepSpeed writes it; "
    "the data was read in the order of param_shapes"
)
_OTHER = (
    "param_slice_mappings disagrees with param_shapes although round_robin_gradients is off; "
    "the data was read in the order of param_shapes"
)


def check_slices(
    partitions: Sequence[Sequence[tuple[FlatGroup, int]]],
    inner: Sequence[Mapping[str, Tree]],
    files: Sequence[RankFile],
    round_robin: bool,
) -> list[str]:
    """Remarks on mappings that disagree with `partitions`; CorruptError if they name other parameters.

    `partitions` has for each rank its groups, and which partition of each it holds.
    """
    agree = True
    for groups, tree, file in zip(partitions, inner, files, strict=True):
        saved = tree.get("param_slice_mappings")
        if saved is None:
            continue
        where = f"{file.path}: param_slice_mappings"
        listed = nodes.sequence(saved, where)
        if len(listed) != len(groups):
            raise CorruptError(f"{where}: {len(listed)} groups where there are {len(groups)}")
        for (group, part), slices in zip(groups, listed, strict=True):
            agree &= _agrees(group, part, nodes.mapping(slices, where), where)
    return [] if agree else [_ROUND_ROBIN if round_robin else _OTHER]


def _agrees(group: FlatGroup, rank: int, slices: Mapping[str, Tree], where: str) -> bool:
    strangers = [name for name in slices if name not in group.shapes]
    if strangers:
        raise CorruptError(
            f"{where}: names {strangers[0]}, which is not in the group's param_shapes",
            hint=MIXED_HINT,
        )
    return {name: nodes.address(node, where) for name, node in slices.items()} == _expected(group, rank)


def _expected(group: FlatGroup, rank: int) -> dict[str, tuple[int, int]]:
    origin, end = rank * group.partition, (rank + 1) * group.partition
    found = {}
    for name, start in group.starts.items():
        a, b = max(start, origin), min(start + numel(group.shapes[name]), end)
        if a < b:
            found[name] = (a - origin, b - a)
    return found


def shapes_of_slices(files: Sequence[RankFile], module: Mapping[str, Shape]) -> list[dict[str, Shape]]:
    """Shapes in flat order where a file has no ``param_shapes``: names from the ranks' mappings, shapes from `module`.

    BF16_Optimizer without ZeRO (a bf16 pipeline, deepspeed/runtime/engine.py ``_do_optimizer_sanity_check``) is saved
    so, and it keeps the plain order. CorruptError if the mappings do not tell all shapes.
    """
    groups: list[dict[str, Shape]] = []
    for file in files:
        tree = file.root["optimizer_state_dict"]
        saved = tree.get("param_slice_mappings")
        if saved is None or "zero_stage" in tree:
            raise FitError(
                f"{file.path}: neither the model file nor this one says how parameters lie in it",
                hint="versions of DeepSpeed before 0.5 do not save param_shapes",
            )
        where = f"{file.path}: param_slice_mappings"
        listed = nodes.sequence(saved, where)
        groups += [{} for _ in range(len(listed) - len(groups))]
        for group, slices in zip(groups, listed, strict=True):
            for name in nodes.mapping(slices, where):
                if name not in module:
                    raise CorruptError(f"{where}: names {name}, which is in no file of weights")
                group[name] = module[name]
    return groups
