"""What the ranks of `bench.load` do: save a state under one layout, and load it under others, in turns.

Every matrix is there before the clock starts, and all ranks start together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ucp
from bench.resume_ranks import _forget_peak, _read, _status

dcp: Any = torch.distributed.checkpoint
"""It does not say how it is typed."""

LAYOUTS = ("ddp", "fsdp", "tp", "hsdp", "fsdp+tp")
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """A transformer's matrices, `layers` of them `width` wide, in folder `root`; `rounds` of each way to load."""

    root: str
    layers: int
    width: int
    rounds: int


Found = dict[str, float]
"""Of one load: ``wall`` and ``cpu`` seconds, bytes ``read`` and ``received``, growth of the ``peak`` resident set."""


def shapes(request: Request) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a decoder of this size trains."""
    n = request.width
    found: dict[str, tuple[int, ...]] = {"embed.weight": (32000, n)}
    for layer in range(request.layers):
        sizes = {"q": (n, n), "k": (n, n), "v": (n, n), "o": (n, n), "up": (4 * n, n), "down": (n, 4 * n), "norm": (n,)}
        found.update({f"layers.{layer}.{name}.weight": size for name, size in sizes.items()})
    return found


def state(request: Request, layout: str) -> dict[str, Tensor]:
    """The matrices under a layout, on the ranks' device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = distributed.get_world_size()
    meshes: dict[str, tuple[tuple[int, ...], list[Any]]] = {
        "fsdp": ((world,), [Shard(0)]),
        "tp": ((world,), [Shard(1)]),
        "hsdp": ((2, world // 2), [Replicate(), Shard(0)]),
        "fsdp+tp": ((world // 2, 2), [Shard(0), Shard(1)]),
    }
    if layout == "ddp":
        return {name: torch.zeros(shape, device=device) for name, shape in shapes(request).items()}
    mesh_shape, placements = meshes[layout]
    mesh = init_device_mesh(device, mesh_shape)
    return {
        name: distribute_tensor(torch.zeros(shape, device=device), mesh, [_fitting(p, shape) for p in placements])
        for name, shape in shapes(request).items()
    }


def _fitting(placement: Any, shape: tuple[int, ...]) -> Any:
    return Replicate() if isinstance(placement, Shard) and placement.dim >= len(shape) else placement


def save(rank: int, _: int, request: Request) -> None:
    """Random numbers, cut by rows, as torch's distributed checkpoint and as a native one."""
    made = state(request, "fsdp")
    torch.manual_seed(rank)
    for tensor in made.values():
        _local(tensor).normal_()
    dcp.save({"model": made}, checkpoint_id=f"{request.root}/dcp")
    ucp.save(made, f"{request.root}/native")


def load(rank: int, world: int, request: Request) -> dict[str, dict[str, list[Found]]]:
    """By layout and way to load, what this rank took in each round. Checks that both load the same numbers."""
    found: dict[str, dict[str, list[Found]]] = {}
    for layout in LAYOUTS:
        held = state(request, layout)
        saved, native = f"{request.root}/dcp", f"{request.root}/native"
        ways: dict[str, Callable[[], Any]] = {
            "dcp.load": partial(dcp.load, {"model": held}, checkpoint_id=saved),
            "ucp.load": partial(ucp.load, held, saved),
            "ucp.load, verify=False": partial(ucp.load, held, saved, verify=False),
            "ucp.load, together=False": partial(ucp.load, held, saved, verify=False, together=False),
            "ucp.load of native": partial(ucp.load, held, native),
            "reading only": partial(_read_share, Path(saved), rank, world),
        }
        found[layout] = {way: [] for way in ways}
        for _round in range(request.rounds):
            for way, run in ways.items():
                found[layout][way].append(_measured(run))
        _check(held, ways)
    return found


def _measured(run: Callable[[], Any]) -> Found:
    distributed.barrier()
    _forget_peak()
    before, read, cpu, started = _status("VmRSS"), _read(), time.process_time(), time.perf_counter()
    report = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    known = isinstance(report, ucp.LoadReport)
    return {
        "wall": wall,
        "cpu": cpu,
        "read": report.bytes_read if known else _read() - read,
        "received": report.bytes_received if known else 0,
        "peak": _status("VmHWM") - before,
    }


def _read_share(folder: Path, rank: int, world: int) -> None:
    """Read this rank's part of all files into one buffer, and do nothing with it: no load can be faster."""
    buffer = memoryview(bytearray(_CHUNK))
    for path in sorted(folder.glob("*.distcp")):
        size = path.stat().st_size
        at, stop = size * rank // world, size * (rank + 1) // world
        with path.open("rb", buffering=0) as file:
            while at < stop:
                at += os.preadv(file.fileno(), [buffer[: min(_CHUNK, stop - at)]], at)


def _check(held: dict[str, Tensor], ways: dict[str, Callable[[], Any]]) -> None:
    ways["dcp.load"]()
    truth = {name: _local(tensor).clone() for name, tensor in held.items()}
    for way in ("ucp.load", "ucp.load of native"):
        for tensor in held.values():
            _local(tensor).zero_()
        ways[way]()
        for name, tensor in held.items():
            assert torch.equal(_local(tensor), truth[name]), f"{way}: {name} differs"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_gpu(rank: int, world: int, what: str, request: Request) -> None:
    """A rank on its own GPU, with NCCL; leaves what it found in the folder."""
    import json

    torch.cuda.set_device(rank)
    distributed.init_process_group(
        "cuda:nccl,cpu:gloo", init_method=f"file://{request.root}/meet-{what}", rank=rank, world_size=world
    )
    result = {"save": save, "load": load}[what](rank, world, request)
    Path(request.root, f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
