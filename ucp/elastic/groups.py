"""The process groups of an elastic job: over everybody first, then over the ranks of the layout alone."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]

from ucp.elastic.meeting import Meeting
from ucp.errors import UsageError
from ucp.layout import Mesh

MEETING_BACKEND = "gloo"


def begin(meeting: Meeting) -> None:
    """Make the default process group of all ranks, unless there is one."""
    if not meeting.grouped:
        _begin(meeting, "everybody", MEETING_BACKEND, meeting.world.size)


def keep_active(meeting: Meeting, mesh: Mesh, backend: str | None) -> bool:
    """Make the default process group that of the ranks of `mesh`, on `backend`; whether this rank is one. Collective.

    So whatever asks for the world, as DeepSpeed, Megatron and DDP do, finds what it can use. UsageError where ranks
    would be spare, and the process group was there before, and if the ranks would take different backends.
    """
    world = meeting.world
    active = world.rank < mesh.size
    if meeting.grouped:
        if mesh.size < world.size:
            raise UsageError(
                f"{mesh} leaves ranks of {world.size} over, and the process group has them all",
                hint="leave init_process_group to the run, which makes it of the ranks that take part",
            )
        return True
    wanted = _agreed(meeting, backend or default_backend(), mesh.size)
    if wanted != MEETING_BACKEND or mesh.size < world.size:
        distributed.destroy_process_group()
        if active:
            _begin(meeting, "active", wanted, mesh.size)
    return active


def tell_size(ranks: int) -> None:
    """Let the launcher's ``WORLD_SIZE`` be the size of the default process group.

    DeepSpeed takes a group of one rank for a mistake where the variable says more (deepspeed/runtime/zero/
    partition_parameters.py, ``_contradicting_single_rank_pg_error``), and others count by it.
    """
    if "WORLD_SIZE" in os.environ:
        os.environ["WORLD_SIZE"] = str(ranks)


def default_backend() -> str:
    """gloo, and NCCL beside it where there is a GPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _agreed(meeting: Meeting, wanted: str, active: int) -> str:
    """What this rank wants, if the `active` ones want the same: one whose GPU is gone would be waited for by all."""
    told: dict[str, list[str]] = {}
    for rank, (backend, node) in enumerate(meeting.gather("backend", [wanted, meeting.world.node])[:active]):
        told.setdefault(backend, []).append(f"rank {rank} on {node}")
    if len(told) > 1:
        lines = [f"  {backend}: {', '.join(ranks)}" for backend, ranks in told.items()]
        raise UsageError(
            "\n".join(["ranks would talk by different backends:", *lines]),
            hint="is there a node without GPUs, or whose driver failed? Run(backend=...) asks for one",
        )
    return wanted


def bound(timeout: float) -> None:
    """Let no operation of any process group that there is now wait longer than `timeout` seconds.

    Groups do not inherit it from the default one (`torch.distributed.new_group`), and device meshes cannot be told.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def device_mesh(mesh: Mesh, device: str, timeout: float) -> Any:
    """The torch DeviceMesh of `mesh`, whose groups wait no longer than `timeout` seconds; it has to have an axis."""
    if not mesh.axes:
        raise UsageError("a device mesh of a layout without axes", hint='the policy should name one, as in {"dp": 1}')
    from torch.distributed.device_mesh import init_device_mesh

    names, shape = zip(*mesh.axes, strict=True)
    made = init_device_mesh(device, shape, mesh_dim_names=names)
    bound(timeout)
    return made


def _begin(meeting: Meeting, name: str, backend: str, size: int) -> None:
    distributed.init_process_group(
        backend,
        store=PrefixStore(name, meeting.store),
        rank=meeting.world.rank,
        world_size=size,
        timeout=timedelta(seconds=meeting.timeout),
    )
