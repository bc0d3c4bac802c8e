"""The mesh of a Megatron-Core job, from the groups that its ranks were split into (megatron/core/parallel_state.py)."""

from __future__ import annotations

from typing import Any

from torch import distributed

from ucp.format.spreads import LiveMesh
from ucp.train.meshes import spread_over


def mesh_of_job() -> LiveMesh | None:
    """The axes of all ranks, outermost first; None where Megatron-Core has not split them.

    Where experts are split another way than the rest, the names of axes tell how, so that two jobs lie alike only if
    all of it is the same: ``tp_ep2_etp1`` is one along which tensors outside experts are parallel. Where ranks are
    numbered otherwise than row-major, it is one axis whose name tells the split.
    """
    from megatron.core import parallel_state as state

    if not (distributed.is_initialized() and state.model_parallel_is_initialized()):
        return None
    groups: dict[str, Any] = {
        "pp": state.get_pipeline_model_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "tp": state.get_tensor_model_parallel_group(),
    }
    lines = {axis: distributed.get_process_group_ranks(group) for axis, group in groups.items()}
    order = sorted(lines, key=lambda axis: _stride(lines[axis]), reverse=True)
    mesh = spread_over([(axis, groups[axis], "R") for axis in order]).mesh
    experts = state.get_expert_model_parallel_world_size(), state.get_expert_tensor_parallel_world_size()
    if mesh.ranks == tuple(range(distributed.get_world_size())):
        alike = experts[0] == 1 and experts[1] == len(lines["tp"])
        return mesh if alike else LiveMesh(tuple((_named(axis, experts), size) for axis, size in mesh.axes), mesh.ranks)
    everybody = tuple(range(distributed.get_world_size()))
    sizes = {**{axis: len(lines[axis]) for axis in order}, "ep": experts[0], "etp": experts[1]}
    return LiveMesh((("_".join(f"{axis}{size}" for axis, size in sizes.items()), len(everybody)),), everybody)


def _named(axis: str, experts: tuple[int, int]) -> str:
    return f"{axis}_ep{experts[0]}_etp{experts[1]}"


def _stride(line: list[int]) -> int:
    """How far apart neighbours are; groups of one are innermost, where they change nothing."""
    return line[1] - line[0] if len(line) > 1 else 0
